"""What ends without a word is noticed on a cluster without accounting too, where there is no sacct to ask."""

import os
import signal

import pytest
from on_slurm import finish, folder_of, jobs_of, reason_of, seen, start, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ENDLESS = ["budget.samples=1000000", "train.checkpoint_every=4000", "train.validate_every=1000000", "train.sample_every=1000000"]


def test_a_cancelled_arm_one_without_memory_and_one_at_its_time_limit(bare, shards, tmp_path):
    """The third is queued again by Slurm's own clock, and goes on with what it saved."""
    cancelled, limited, large = (f"model.mlp_dim={n}" for n in (32, 48, 2_000_000))
    process = start(bare, *ENDLESS, "model.mlp_dim=32,48,2000000", "launcher.grace=100", "launcher.memory_gb=1")
    wait_until(lambda: seen(tmp_path / folder_of(*ENDLESS, cancelled), 4), process)
    jobs = jobs_of(tmp_path)
    bare.ask("scancel", jobs[cancelled])
    folder = tmp_path / folder_of(*ENDLESS, limited)
    wait_until(lambda: seen(folder, 4), process)
    # a limit is a number of minutes; one that ends in 60 to 120 seconds has the arm told to save at most 20 from now
    bare.limit(jobs[limited], bare.minutes(jobs[limited]) + 2)
    wait_until(lambda: bare.restarts(jobs[limited]) == 1, process)
    bare.limit(jobs[limited], 60)
    reached = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoints/samples-*"))
    assert reached > 0
    wait_until(lambda: seen(folder, reached + 4), process)
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "CANCELLED by somebody" in reason_of(cancelled, output)
    assert "it took more memory than it was given; raise launcher.memory_gb" in reason_of(large, output)
    assert bare.jobs("running,pending") == []
