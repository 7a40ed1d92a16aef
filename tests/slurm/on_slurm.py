"""A sweep of the tiny run, as a person starts it on the cluster."""

import contextlib
import json
import subprocess
import sys
import time

from tiny_run import TINY

from hdm.config.compose import compose
from hdm.config.identity import run_name
from hdm.config.lines import REPOSITORY
from hdm.track.events import read, series

SLURM = ["launcher=slurm", "launcher.poll=2", "track.uri=off", "launcher.cpus=1"]


def start(cluster, *arguments):
    command = [sys.executable, "-m", "hdm.sweep", *TINY, *SLURM, *arguments]
    environment = cluster.environment | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def folder_of(*overrides):
    run = compose([*TINY, *overrides])
    return f"{run.out}/{run_name(run)}"


def wait_until(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def jobs_of(tmp_path):
    """The Slurm jobs that a launcher wrote down, by arm."""
    with contextlib.suppress(ValueError):
        (path,) = tmp_path.glob("runs/sweeps/*/arms.json")
        return {label: arm["job"]["job_id"] for label, arm in json.loads(path.read_text()).items() if arm["job"]}
    return {}


def reason_of(label, output):
    """The line of the report about an arm that failed."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"failed: {label}:"))
    return line


def seen(folder, samples):
    """Whether the run in `folder` has recorded a loss at `samples` or later."""
    points = series(read(folder), "train/loss")
    return bool(points) and points[-1][0] >= samples
