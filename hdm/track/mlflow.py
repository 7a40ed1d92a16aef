"""Tracking of a run while it goes on: its log is sent to MLflow from a thread, so that training never waits for a server."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdm.config.schema import RunConfig
from hdm.track import environment
from hdm.track.events import EventLog, redact
from hdm.track.replica import Replica, reason, say
from hdm.track.system import SystemMonitor
from hdm.track.uri import link, resolve


@contextlib.contextmanager
def tracking(run: RunConfig, folder: Path, log: EventLog) -> "Iterator[Tracker]":
    """Record code, machine and status of `run` and send its log to `run.track.uri` until the context ends.

    An exception that leaves the context is recorded as the reason for which the run failed. Raises TrackingError at once for a
    URI that MLflow cannot use.
    """
    shipper = Shipper(folder, uri=run.track.uri, experiment=run.track.experiment, run_name=run.track.name, parent=run.track.parent)
    environment.record(log)
    log.artifact(folder / "config.json")
    log.status("running")
    tracker = Tracker(log, shipper)
    with shipper:
        try:
            with SystemMonitor(log):
                yield tracker
        except KeyboardInterrupt:
            log.status("interrupted")
            raise
        except BaseException as error:
            log.status("failed", f"{type(error).__name__}: {reason(error)}")
            raise


class Tracker:
    """What `tracking` hands out."""

    def __init__(self, log: EventLog, shipper: "Shipper") -> None:
        self._log, self._shipper = log, shipper

    def finish(self, status: str) -> None:
        """Record how the run ended: finished or interrupted."""
        self._log.status(status)

    def farewell(self) -> str:
        """What to tell the person who started the run: where it can be looked at."""
        return "\n".join(self._shipper.link())


class Shipper:
    """A thread that keeps the copy of a run on a server up to date while the run goes on. Training never waits for it.

    `uri` as in `track.uri` (None: the default, "off": nothing is sent). Raises TrackingError for a URI that MLflow cannot use; a
    server that does not answer is reported once and tried again, last of all in `stop`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str = "",
        parent: str | None = None,
        interval: float = 2.0,
    ) -> None:
        resolved = resolve(uri)
        self._interval, self._warned, self._failure = interval, False, ""
        self._stop = threading.Event()
        self._patience = 0.0
        self._replica = Replica(folder, uri=resolved, experiment=experiment, run_name=run_name, parent=parent) if resolved else None
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def __enter__(self) -> "Shipper":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> "Shipper":
        """Begin sending."""
        if self._replica is not None:
            self._thread.start()
        return self

    def stop(self, patience: float = 20.0) -> bool:
        """Send the rest, trying for `patience` seconds after the first failure; True when everything has arrived."""
        if self._replica is None:
            return True
        self._patience = patience
        self._stop.set()
        self._thread.join(timeout=patience + 120)
        if self._failure or self._thread.is_alive():
            problem = self._failure or "is too slow"
            say(f"{redact(self._replica.uri)}: {problem}; send the rest later: {_sync_command(self._replica)}")
            return False
        return True

    def link(self, **view: Any) -> list[str]:
        """The lines that tell how to look at the run among the others; `view` as in `hdm.track.uri.fragment`."""
        uri, experiment, _ = self.place
        return link(uri, experiment, **view) if experiment else []

    @property
    def place(self) -> tuple[str, str, str]:
        """(URI, experiment id, run id) of the run on the server; empty texts where there is none, or before anything was sent."""
        return (self._replica.uri, *self._replica.location) if self._replica else ("", "", "")

    def _run(self) -> None:
        assert self._replica is not None
        wait, deadline = self._interval, float("inf")
        while True:
            last = self._stop.is_set()
            try:
                self._replica.ship()
                self._failure, wait = "", self._interval
                if last:
                    return
            except Exception as error:  # whatever it is, the run goes on; the events are safe in the log
                self._fail(error)
                wait = min(2 * wait, 60.0)
            if last:
                deadline = min(deadline, time.monotonic() + self._patience)
                if time.monotonic() + 2 > deadline:
                    return
                time.sleep(2)
            else:
                self._stop.wait(wait)

    def _fail(self, error: Exception) -> None:
        assert self._replica is not None
        self._failure = reason(error)
        if not self._warned:
            self._warned = True
            folder, uri = self._replica.folder, redact(self._replica.uri)
            say(f"{uri}: {self._failure}; the run goes on, its events stay in {folder} and are sent when the server takes them")


def _sync_command(replica: Replica) -> str:
    return f"python -m hdm.sync {replica.folder} uri={redact(replica.uri)} experiment={replica.experiment}"
