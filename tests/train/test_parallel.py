"""Two processes of half the batch learn what one process learns, DDP or FSDP2, and go on where another number stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from squares import NANO, write_tar

from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.train.parallel import World, world

pytestmark = pytest.mark.slow

RUN = [
    "schedule=constant",
    "train.batch_size=8",
    "train.accumulation=2",
    "budget.steps=6",
    "train.log_every=8",
    "train.validate_every=24",
    "validation.samples=8",
    "validation.batch_size=3",
    "validation.whole=true",
    "sampling.grid=3",
    "sampler.steps=2",
]
STEMS = ("model", "ema-power", "ema-decay", "optimizer")


def start(processes: int, folder, *overrides, port: int) -> subprocess.Popen:
    """`processes` processes of one run in the current folder, each a fresh interpreter."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    program = [str(here / "spread_run.py"), str(folder), *RUN, *overrides]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    return subprocess.Popen([sys.executable, *command, *program], env=environment, stderr=subprocess.PIPE, text=True)


def launch(processes: int, folder, *overrides, port: int) -> list:
    """What the first process of a run heard."""
    job = start(processes, folder, *overrides, port=port)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors[-3000:]
    return json.loads((folder / "heard-0.json").read_text())


def weights(folder, samples=48):
    return {stem: load_file(folder / "checkpoints" / f"samples-{samples:09d}" / f"{stem}.safetensors") for stem in STEMS}


def apart(a, b) -> float:
    """The largest difference of two checkpoints, relative to the largest value of its tensor."""
    assert a.keys() == b.keys()
    worst = 0.0
    for stem in a:
        assert a[stem].keys() == b[stem].keys()
        for name, tensor in a[stem].items():
            scale = tensor.abs().max().clamp(min=1e-3)
            worst = max(worst, ((tensor - b[stem][name]).abs().max() / scale).item())
    return worst


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process: what it heard and what it weighs after six steps, and after nine."""
    folder = tmp_path_factory.mktemp("single")
    write_tar(folder / "shards" / "train.tar", 24)
    write_tar(folder / "shards" / "val.tar", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        heard = launch(1, folder / "run", port=29611)
        six = weights(folder / "run")
        launch(1, folder / "run", "budget.steps=9", port=29611)
    return heard, six, weights(folder / "run", 72), folder / "run"


@pytest.mark.parametrize(("strategy", "port"), [("ddp", 29612), ("fsdp", 29613)])
def test_two_processes_learn_what_one_learns_and_another_number_goes_on(single, shards, tmp_path, strategy, port):
    (status, samples, heard), six, nine, _ = single
    folder = tmp_path / strategy
    halfway = launch(2, folder, f"parallel.strategy={strategy}", "budget.steps=3", port=port)
    assert halfway[:2] == ["finished", 24]
    both = launch(2, folder, f"parallel.strategy={strategy}", port=port)
    assert both[:2] == [status, samples] == ["finished", 48]
    assert apart(six, weights(folder)) < 2e-4
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        after = {samples: value for samples, value in heard[key].items() if int(samples) > 24}
        assert both[2][key] == pytest.approx(after, rel=1e-4), key
    assert list(both[2]["cost/flops"].values())[-1] == list(heard["cost/flops"].values())[-1]
    for said, devices in ((heard, 1), (both[2], 2)):  # GPU-hours are those of all, images per second too
        seconds = {int(samples): value for samples, value in said["cost/seconds"].items()}
        for samples, spent in said["cost/gpu_hours"].items():
            assert spent == pytest.approx(devices * seconds[int(samples)] / 3600)
        first, last = sorted(seconds)[-2:]
        assert said["speed/images_per_second"][str(last)] == pytest.approx((last - first) / (seconds[last] - seconds[first]))

    _, _, alone = launch(1, folder, "budget.steps=9", port=port)  # what two began, one goes on with
    assert apart(nine, weights(folder, 72)) < 2e-4
    spent, hours = both[2]["cost/seconds"]["48"], alone["cost/gpu_hours"]["72"] * 3600
    assert hours == pytest.approx(2 * spent + alone["cost/seconds"]["72"] - spent, rel=0.05)  # and what followed the last record


def test_processes_share_out_validation_and_pictures_and_wait_for_each_other(single, shards, tmp_path, monkeypatch):
    """Equal weights are measured to the same bits by any number; each stage begins with the checkpoint of the one before."""
    (_, _, heard), _, _, alone = single
    stages = ["budget.steps=null", "stages.a.steps=2", "stages.b.steps=2", "stages.b.crop.size=20", "stages.c.steps=1"]
    monkeypatch.setenv("SLOW_DISK", "1")
    status, samples, both = launch(3, tmp_path / "three", *stages, "train.batch_size=6", port=29640)
    assert [status, samples, both["train/stage"]["24"]] == ["finished", 30, 1.0]
    for key in ("val/loss", "val/loss_whole"):
        assert both[key]["0"] == heard[key]["0"]
    one, three = (np.asarray(Image.open(f / "samples/samples-000000000.png"), float) for f in (alone, tmp_path / "three"))
    assert abs(one - three).max() <= 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=schedule_free", "parallel.strategy=fsdp"],
        ["backbone=mmdit", "text_fusion=mmdit", "routing=none", "parallel.strategy=fsdp"],
        ["optimizer=muon", "routing=sprint", "routing.rate=0.0", "parallel.strategy=ddp", "parallel.compress=fp16"],
    ],
    ids=["schedule_free-fsdp", "mmdit-fsdp", "muon-unused-fp16-ddp"],
)
def test_other_parts_of_the_laboratory(shards, tmp_path, overrides):
    one = launch(1, tmp_path / "one", *overrides, port=29620)
    two = launch(2, tmp_path / "two", *overrides, port=29620)
    assert two[2]["val/loss"] == pytest.approx(one[2]["val/loss"], rel=2e-3)
    if "parallel.compress=fp16" not in overrides:
        # Adam makes whole steps of gradients that are rounding alone, where weights begin at zero
        assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < 2e-3


def test_a_lost_process_is_said_and_nothing_is_lost(shards, tmp_path):
    folder = tmp_path / "run"
    job = start(2, folder, "budget.steps=100000", "train.checkpoint_every=16", port=29630)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("checkpoints/samples-*"))) < 3:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another process of this run is gone" in errors
    from hdm.train.checkpoint import latest

    assert latest(folder) is not None


def test_a_batch_that_cannot_be_met(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = compose([*NANO, "train.batch_size=8"])
    with (
        pytest.raises(ConfigError, match=r"train\.batch_size=8: 3 processes x train\.accumulation=1 do not divide it; .* 9"),
        world(run, torch.device("cpu")),
    ):
        pass


def test_alone_there_is_nobody_to_ask():
    alone = World()
    assert (alone.summed([1.5, 2.0]), alone.gathered("x"), alone.any(True), alone.any(False)) == ([1.5, 2.0], ["x"], True, False)
