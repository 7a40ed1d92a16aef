"""A sweep of the tiny run, as a person starts it on the cluster."""

import os
import subprocess
import sys
import time

from tiny_run import TINY

from hdm.config.compose import compose
from hdm.config.identity import run_name
from hdm.config.lines import REPOSITORY
from hdm.track.events import read, series

ENVIRONMENT = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests/slurm", "OMP_NUM_THREADS": "1"}
SLURM = ["launcher=slurm", "launcher.poll=2", "track.uri=off", "launcher.cpus=1"]
LONG = ["budget.samples=400", "train.checkpoint_every=20"]


def start(*arguments):
    command = [sys.executable, "-m", "hdm.sweep", *TINY, *SLURM, *arguments]
    return subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def folder_of(*overrides):
    run = compose([*TINY, *overrides])
    return f"{run.out}/{run_name(run)}"


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def seen(folder, samples):
    """Whether the run in `folder` has recorded a loss at `samples` or later."""
    points = series(read(folder), "train/loss")
    return bool(points) and points[-1][0] >= samples
