"""What ends without a word is noticed on a cluster without accounting too, where there is no sacct to ask."""

import pytest
from on_slurm import LONG, finish, folder_of, seen, start, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_cancelled_arm_is_reported_and_the_other_goes_on(bare, shards, tmp_path):
    process = start(*LONG, "merge=cross,concat")
    wait_until(lambda: seen(tmp_path / folder_of(*LONG, "merge=cross"), 4), process)
    bare.ask("scancel", min(bare.jobs("running")))
    code, output = finish(process)
    assert code == 1, output
    assert "failed: merge=cross: Slurm job" in output
    assert "CANCELLED by somebody" in output
    assert (tmp_path / folder_of(*LONG, "merge=concat") / "result.json").exists()


def test_an_arm_that_takes_too_much_memory_is_reported(bare, shards, tmp_path):
    code, output = finish(start(*LONG, "merge=cross", "seeds=1", "launcher.memory_gb=0.1"))
    assert code == 1, output
    assert "failed: seed=0: Slurm job" in output
    assert "more memory than it was given; raise launcher.memory_gb" in output, output
