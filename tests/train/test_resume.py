"""kill -9 in the middle: the run goes on from its last checkpoint and ends with the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from squares import NANO, Listener, write_tar

from hdm.config.compose import compose
from hdm.config.errors import DataError
from hdm.train.checkpoint import latest
from hdm.train.loop import train

STEPS, KILLED, BATCH = 20, 11, 4


def run_of(*overrides):
    common = [f"budget.steps={STEPS}", "train.log_every=4", "train.checkpoint_every=12", "validation.samples=2"]
    return compose([*NANO, *common, *overrides])


@pytest.mark.parametrize(
    ("common", "first", "second"),
    [
        (["routing.rate=0.5"], ["train.workers=0"], ["train.workers=2"]),
        (["train.accumulation=2", "train.precision=bf16"], ["train.workers=2"], ["train.workers=0"]),
    ],
)
def test_eleven_steps_kill_nine_more(shards, tmp_path, common, first, second):
    straight = train(run_of(*common), tmp_path / "straight", Listener())
    here = str(Path(__file__).parent)
    program = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from pathlib import Path\n"
        "from squares import Killer\n"
        "from test_resume import run_of, train\n"
        f"train(run_of(*{[*common, *first]!r}), Path('run'), Killer({KILLED * BATCH}, 36))"
    )
    root = str(Path(__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert latest(tmp_path / "run").name == "samples-000000036"  # step 9

    listener = Listener()
    resumed = train(run_of(*common, *second), tmp_path / "run", listener)
    assert listener.rewound == [36]
    assert resumed.samples == STEPS * BATCH
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert a == b, stem


def test_a_run_does_not_go_on_with_other_data(shards, tmp_path):
    train(run_of("budget.steps=2"), tmp_path / "run", Listener())
    write_tar(shards / "train.tar", 20)
    with pytest.raises(DataError, match=r"samples-000000008: the training data have changed since .*another name=") as error:
        train(run_of("budget.steps=2"), tmp_path / "run", Listener())
    assert "\n" not in str(error.value)


def test_a_finished_run_is_not_trained_further(shards, tmp_path):
    run = run_of("budget.steps=2")
    first = train(run, tmp_path / "run", Listener())
    written = first.checkpoint.stat().st_mtime_ns
    again = train(run, tmp_path / "run", Listener())
    assert again.status == "finished"
    assert again.checkpoint.stat().st_mtime_ns == written
    assert again.metrics["val/loss"] == first.metrics["val/loss"]
    assert again.metrics["model/parameters"] == first.metrics["model/parameters"]
