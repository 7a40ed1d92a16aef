"""Snapshots of a real run: when they are taken, what they hold, what interruption does to them, and what is made of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from squares import Listener

from hdm.config.compose import compose
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import EmaConfig
from hdm.plan import plan
from hdm.train import snapshots
from hdm.train.checkpoint import load_model
from hdm.train.ema import Averages, power_exponent
from hdm.train.loop import train
from hdm.train.parallel import World
from hdm.train.posthoc import Profile

SNAPSHOTS = ["ema.snapshot_every=12", "optimizer.lr=0.05", "validation.samples=2"]  # every third step of 4


@pytest.fixture
def trail(monkeypatch):
    """The weights behind every step, in float64: [(samples, {name: tensor}), …]."""
    steps, original = [], Averages.update

    def update(self, *, samples, fresh):
        original(self, samples=samples, fresh=fresh)
        steps.append((samples, {n: w.double().clone() for n, w in zip(self.names, self.weights, strict=True)}))

    monkeypatch.setattr(Averages, "update", update)
    return steps


def tracked(trail, width, until):
    """The power-function average of the trail, step by step in float64."""
    power, before, mean = power_exponent(width) + 1, 0, {}
    for samples, weights in trail:
        if samples <= until:
            beta = (before / samples) ** power
            mean = {n: beta * mean[n] + (1 - beta) * w if mean else w for n, w in weights.items()}
            before = samples
    return mean


def distance(found, expected):
    """||found - expected|| / ||expected|| over all parameters."""
    square = sum(((found[n].detach().double() - e).square().sum().item()) for n, e in expected.items())
    return (square / sum(float(e.square().sum()) for e in expected.values())) ** 0.5


def names(folder):
    return [path.stem for path in sorted((folder / "snapshots").iterdir())]


def test_other_widths_than_the_stored_are_those_that_would_have_been_tracked(nano, tmp_path, trail):
    result = train(nano("budget.steps=64", *SNAPSHOTS), tmp_path / "run", Listener())
    assert names(tmp_path / "run") == [f"samples-{n:09d}" for n in range(12, 256, 12)]
    start, end = trail[0][1], trail[-1][1]
    assert distance(start, end) > 0.05  # the network has moved
    for width, limit in ((0.05, 1e-6), (0.1, 1e-6), (0.07, 2e-4), (0.15, 2e-4), (0.2, 5e-4), (0.03, 2e-3)):
        made = load_model(result.checkpoint, weights=f"ema:{width}")
        assert made.weights == f"ema-{width:g}"
        found = dict(made.model.named_parameters())
        assert distance(found, tracked(trail, width, 256)) < limit, width
    assert distance(tracked(trail, 0.07, 256), tracked(trail, 0.1, 256)) > 1e-3


def test_widths_are_made_of_snapshots_from_several_stages(nano, tmp_path, trail):
    """Batches of 4, then of 8, another size of images: one trajectory, and one row of snapshots."""
    stages = [
        "budget.steps=null", "stages.a.steps=32", "stages.a.crop.size=16",
        "stages.b.steps=16", "stages.b.crop.size=20", "stages.b.train.batch_size=8",
    ]  # fmt: skip
    result = train(nano(*SNAPSHOTS, *stages), tmp_path / "run", Listener())
    assert [samples for samples, _ in trail] == [*range(4, 129, 4), *range(136, 257, 8)]
    assert names(tmp_path / "run")[9:12] == ["samples-000000120", "samples-000000136", "samples-000000144"]  # 132 lies in a step
    for width, limit in ((0.07, 2e-4), (0.15, 3e-4)):
        made = load_model(result.checkpoint, weights=f"ema:{width}")
        assert distance(dict(made.model.named_parameters()), tracked(trail, width, 256)) < limit, width


def test_a_snapshot_holds_the_averages_of_its_moment(nano, tmp_path, trail):
    train(nano("budget.steps=8", *SNAPSHOTS), tmp_path / "run", Listener())
    stored = load_file(tmp_path / "run" / "snapshots" / "samples-000000024.safetensors")
    for width in (0.05, 0.1):
        expected = tracked(trail, width, 24)
        assert {key.split("/")[1] for key in stored if key.startswith(f"{width}/")} == set(expected)
        for name, tensor in expected.items():
            found = stored[f"{width}/{name}"]
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.double(), tensor, rtol=2**-10, atol=2**-24)


class Killed(Listener):
    """Interrupts training, without a chance to save, when what lies at `at` samples is logged."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def metrics(self, values, samples):
        if samples == self.at and "train/loss" in values:
            raise SystemExit


class Seen(Listener):
    """What snapshots there are when the run goes on."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.found = folder, []

    def rewind(self, samples):
        self.found = names(self.folder)


def test_an_interrupted_run_takes_each_snapshot_once(nano, tmp_path):
    straight = nano("budget.steps=16", "train.checkpoint_every=20", *SNAPSHOTS)
    train(straight, tmp_path / "straight", Listener())
    with pytest.raises(SystemExit):
        train(straight, tmp_path / "resumed", Killed(at=56))
    assert names(tmp_path / "resumed")[-1] == "samples-000000048"  # taken behind the last checkpoint, at 40
    listener = Seen(tmp_path / "resumed")
    train(straight, tmp_path / "resumed", listener)
    assert listener.found == ["samples-000000012", "samples-000000024", "samples-000000036"]
    assert names(tmp_path / "resumed") == names(tmp_path / "straight") == [f"samples-{n:09d}" for n in (12, 24, 36, 48, 60)]
    for name in names(tmp_path / "straight"):
        a, b = (tmp_path / run / "snapshots" / f"{name}.safetensors" for run in ("straight", "resumed"))
        assert a.read_bytes() == b.read_bytes(), name


def test_averages_follow_the_weights_whatever_the_batch_was(tmp_path):
    """Three widths over a trajectory whose batch changes twice, stored and put together again through files."""
    draw = np.random.Generator(np.random.Philox(3))
    model = torch.nn.Linear(40, 5)
    config = EmaConfig(power=0.07, decay=0, snapshot_every=1)
    averages, weights, samples, trail = Averages(model, config), model.weight.detach().double(), 0, []
    for step in range(300):
        fresh = 2 if step < 100 else 8 if step < 200 else 4
        weights = weights + 0.02 * torch.from_numpy(draw.standard_normal((5, 40)))
        model.weight.data.copy_(weights)
        samples += fresh
        averages.update(samples=samples, fresh=fresh)
        trail.append((samples, {"weight": model.weight.detach().double().clone()}))
        if samples % 56 == 0:
            snapshots.write(tmp_path, samples=samples, averages=averages.snapshot(), world=World())
    expected = tracked(trail, 0.07, samples)
    assert distance({"weight": averages.tensors["power"][0]}, expected) < 1e-6
    found = made(tmp_path, width=0.07, at=1400)
    assert distance(found, {"weight": tracked(trail, 0.07, 1400)["weight"]}) < 1e-3


def made(folder, *, width, at):
    """The average at the snapshot taken at `at`, as a checkpoint without averages of its own asks for it."""
    sources = snapshots.find(folder / "checkpoints" / "none", EmaConfig(power=0, snapshot_every=1), samples=at + 1)
    wanted = Profile(width=width, samples=at)
    return snapshots.synthesize(sources, [snapshots.plan(sources, wanted)])[0]


def write(folder, samples, fill=1.0):
    group = {"a": torch.full((100,), fill), "b": torch.zeros(2, 3)}
    snapshots.write(folder, samples=samples, averages={0.05: group, 0.1: group}, world=World())


def test_a_snapshot_is_complete_or_not_there(tmp_path):
    """Where `snapshots` is a file nothing can be written, as on a full disk; what is written lies nowhere under another name."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "snapshots").write_text("")
    with pytest.raises(CheckpointError, match=r"samples-000000008\.safetensors: cannot be saved: .*it needs 0 MB\. Free") as error:
        write(tmp_path / "full", 8)
    assert "\n" not in str(error.value)
    write(tmp_path, 8, fill=3.0)
    write(tmp_path, 8, fill=5.0)  # again: replaced
    assert names(tmp_path) == ["samples-000000008"]
    assert load_file(tmp_path / "snapshots" / "samples-000000008.safetensors")["0.05/a"].unique().tolist() == [5.0]
    write(tmp_path, 16)
    snapshots.drop_after(tmp_path, 8)
    assert names(tmp_path) == ["samples-000000008"]


def test_what_cannot_be_made_is_refused_in_one_line(nano, tmp_path):
    without = train(nano("budget.steps=2"), tmp_path / "without", Listener()).checkpoint
    with_two = train(nano("budget.steps=6", *SNAPSHOTS), tmp_path / "two", Listener()).checkpoint
    for checkpoint, weights, kind, message in (
        (without, "ema:0.07", CheckpointError, "has no snapshots.*ema.snapshot_every="),
        (with_two.with_name("samples-000000000"), "ema:0.07", CheckpointError, "has no snapshots"),
        (with_two, "ema:0.01", CheckpointError, r"width 0\.01: what is stored up to 24 samples misses \d\d%"),
        (with_two, "ema:0.3", ConfigError, r"weights=ema:0\.3: '0\.3' is no width"),
        (with_two, "ema:wide", ConfigError, "weights=ema:wide: 'wide' is no width"),
        (with_two, "eva", ConfigError, r"weights=eva: no such weights \(options: ema, raw, ema_decay, ema:WIDTH\)"),
    ):
        with pytest.raises(kind, match=message) as error:
            load_model(checkpoint, weights=weights)
        assert "\n" not in str(error.value)
    first = tmp_path / "two" / "snapshots" / "samples-000000012.safetensors"
    save_file({"0.05/a": torch.zeros(1), "0.1/a": torch.zeros(1)}, first)
    with pytest.raises(CheckpointError, match=r"has no tensor '0\.05/.*remove the file"):
        load_model(with_two, weights="ema:0.07")
    first.write_bytes(first.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"samples-000000012\.safetensors: not readable: .*remove it"):
        load_model(with_two, weights="ema:0.07")


@pytest.mark.parametrize("widths", ["[0.1]", "[0.1,0.1]", "[0.05,0.3]", "[]", "[0,0.1]"])
def test_widths_that_nothing_can_be_made_of(widths):
    with pytest.raises(ConfigError, match=r"ema\.snapshot_powers=.*two different widths or more"):
        compose([f"ema.snapshot_powers={widths}"])
    with pytest.raises(ConfigError, match=r"ema\.snapshot_every=-1: must be 0 or above"):
        compose(["ema.snapshot_every=-1"])


def test_the_plan_counts_what_is_written(nano, tmp_path):
    run = nano("budget.steps=8", *SNAPSHOTS)
    counted = plan(run).total_parameters
    count, size = snapshots.size(run.ema, parameters=counted, samples=32)
    train(run, tmp_path / "run", Listener())
    written = list((tmp_path / "run" / "snapshots").iterdir())
    assert len(written) == count == 2
    assert size == 2 * 2 * counted
    assert all(0 <= path.stat().st_size - size < 40_000 for path in written)  # and a header of names
    assert snapshots.size(EmaConfig(), parameters=counted, samples=32)[0] == 0


@pytest.mark.slow
def test_averages_that_are_spread_over_processes_are_stored_whole(nano, tmp_path):
    words = ["budget.steps=6", *SNAPSHOTS]
    train(nano(*words), tmp_path / "one", Listener())
    here = Path(__file__).parent
    program = [str(here / "spread_run.py"), "two", *words, "parallel.strategy=fsdp", "device=cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29631", *program]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert names(tmp_path / "two") == names(tmp_path / "one") == ["samples-000000012", "samples-000000024"]
    for name in names(tmp_path / "one"):
        one, two = (load_file(tmp_path / run / "snapshots" / f"{name}.safetensors") for run in ("one", "two"))
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
        for key, value in one.items():
            torch.testing.assert_close(two[key].float(), value.float(), rtol=2**-9, atol=1e-4)
