"""Sweeps on a real Slurm: arrays, failures, cancelling, memory, time limits, preemption, a dead launcher, several nodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from on_slurm import ENVIRONMENT, LONG, finish, folder_of, seen, start, wait_until
from safetensors.torch import load_file
from tiny_run import TINY

from hdm.config.lines import REPOSITORY
from hdm.launch.job import _join
from hdm.launch.options import LauncherOptions
from hdm.launch.slurm import SlurmLauncher
from hdm.track.events import read

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def kept(tmp_path):
    """What the launcher wrote down of its jobs, by arm."""
    (path,) = tmp_path.glob("runs/sweeps/*/arms.json")
    return json.loads(path.read_text())


def test_an_array_in_which_one_arm_fails(accounted, shards, tmp_path):
    code, output = finish(start("optimizer.lr=1e-3,1e30"))
    assert code == 1, output
    assert "failed: optimizer.lr=1e+30: step" in output
    (line,) = (line for line in output.splitlines() if "failed: optimizer.lr=1e+30" in line)
    assert "loss is nan" in (tmp_path / line.split("log: ")[1].rstrip(")")).read_text()
    assert (tmp_path / folder_of("optimizer.lr=1e-3") / "result.json").exists()
    states = accounted.ask("sacct", "-n", "-X", "-o", "JobID").split()
    assert states == [f"{states[0].split('_')[0]}_{n}" for n in (0, 1)]  # one array
    code, output = finish(start("optimizer.lr=1e-3,1e30", "retry_failed=false"))
    assert code == 1, output
    assert "loss is nan" in output
    assert accounted.ask("sacct", "-n", "-X", "-o", "JobID").split() == states  # nothing was started


def test_preemption_and_a_dead_launcher_change_no_bit(accounted, shards, tmp_path):
    """The arm is preempted in the middle while nobody watches; the next launcher finds its job again."""
    process = start(*LONG, "merge=cross", "seeds=1")
    folder = tmp_path / folder_of(*LONG, "merge=cross")
    wait_until(lambda: seen(folder, 40), process)
    process.kill()
    process.communicate()
    ((_, arm),) = kept(tmp_path).items()
    job = arm["job"]["job_id"]
    accounted.ask("srun", "--partition=prio", "--nodes=2", "--exclusive", "sleep", "1")
    again = start(*LONG, "merge=cross", "seeds=1")
    code, output = finish(again)
    assert code == 0, output
    assert accounted.restarts(job) == 1
    assert accounted.jobs()[-1] != job or len(accounted.jobs()) > 0
    assert [e.type for e in read(folder)].count("rewind") + [e.data.get("status") for e in read(folder)].count("running") >= 2
    single = [sys.executable, "-m", "hdm.run", *TINY, *LONG, "merge=cross", "out=single", "track.uri=off"]
    subprocess.run(single, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
    (mine,), (theirs,) = (
        sorted(path.glob("checkpoints/samples-000000400/model.safetensors")) for path in (folder, tmp_path / "single" / folder.name)
    )
    mine, theirs = load_file(mine), load_file(theirs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_time_limit_saves_and_queues_again(accounted, shards, tmp_path):
    """Slurm's own clock, whose smallest unit is a minute."""
    arguments = (
        "budget.samples=1000000",
        "train.checkpoint_every=4000",
        "train.validate_every=1000000",
        "train.sample_every=1000000",
    )
    process = start(*arguments, "merge=cross", "seeds=1", "launcher.minutes=1", "launcher.grace=20")
    folder = tmp_path / folder_of(*arguments, "merge=cross")
    wait_until(lambda: kept_jobs(tmp_path), process)
    ((_, arm),) = kept(tmp_path).items()
    wait_until(lambda: accounted.restarts(arm["job"]["job_id"]) >= 1, process)
    (checkpoint, *_) = sorted(folder.glob("checkpoints/samples-*"), reverse=True)
    reached = int(checkpoint.name.split("-")[1])
    assert reached > 0
    wait_until(lambda: seen(folder, reached + 4), process)
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert accounted.jobs("running,pending") == []


def kept_jobs(tmp_path):
    with contextlib.suppress(ValueError, FileNotFoundError):
        return kept(tmp_path)
    return {}


@dataclass
class Probe:
    """A job that meets its other ranks."""

    def __call__(self):
        import torch.distributed as dist

        rank = _join()
        dist.init_process_group("gloo")
        total = torch.tensor([1.0 + rank])
        dist.all_reduce(total)
        dist.barrier()
        dist.destroy_process_group()
        return {"status": "finished", "reason": f"{os.environ['SLURM_JOB_NUM_NODES']} {os.environ['WORLD_SIZE']} {total.item():g}"}


def test_ranks_on_two_nodes_find_each_other(accounted, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY}/tests/slurm:{REPOSITORY}/tests/launch")
    options = LauncherOptions(nodes=2, tasks=2, cpus=1, poll=2, memory_gb=1.5)
    launcher = SlurmLauncher(tmp_path / "jobs", None, options=options, name="probe")
    (job,) = launcher.submit([Probe()])
    deadline = time.monotonic() + 120
    while not job.done():
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.2)
    assert job.result() == {"status": "finished", "reason": "2 4 10"}
