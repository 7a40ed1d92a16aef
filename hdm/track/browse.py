"""`--open`: the person's browser, on a page of MLflow."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser

from hdm.config.errors import TrackingError
from hdm.track.events import redact
from hdm.track.uri import server_command

_PATIENCE = 120.0  # seconds for a server to come up


def browse(uri: str, fragment: str) -> None:
    """Open `fragment` of the UI at the resolved `uri`. A database is served on 127.0.0.1, until Ctrl-C.

    Raises TrackingError where no server comes up.
    """
    if uri.startswith("http"):
        open_page(redact(uri) + fragment)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = server_command(uri, port)
    if not command:
        raise TrackingError(f"--open: {redact(uri)} is not served from here; start mlflow server, and name it with track.uri=")
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(process, f"http://127.0.0.1:{port}/health")
        open_page(f"http://127.0.0.1:{port}{fragment}")
        print("served until Ctrl-C", flush=True)
        process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=2).read()
            return
        except OSError:
            time.sleep(0.3)
    raise TrackingError("--open: the MLflow server did not come up; start it by the printed command to see why")


def open_page(address: str) -> None:
    """Show `address` in the person's browser, or say it where there is none."""
    if not webbrowser.open(address):
        print(f"no browser was found; open {address}")
