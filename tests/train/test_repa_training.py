"""Training with REPA: real weights as the teacher, a projector that resumes to the bit, nothing else moved."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from squares import NANO, Listener

from hdm.config.axes import ALIGNMENT
from hdm.config.compose import compose
from hdm.config.errors import AssetError
from hdm.model import Architecture, build
from hdm.train.checkpoint import latest, load_model, read_tensors
from hdm.train.loop import train
from hdm.train.optimizer import fan_ins

STEPS, KILLED, BATCH = 20, 11, 4
REPA = ["alignment=repa", "teacher=efficientnet", "teacher.size=32", "alignment.hidden=24"]
COMMON = [f"budget.steps={STEPS}", "train.log_every=4", "train.checkpoint_every=12", "validation.samples=2"]


def run_of(*overrides):
    return compose([*NANO, *REPA, *COMMON, *overrides])


def plain(*overrides):
    return compose([*NANO, *COMMON, *overrides])


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(shards, tmp_path):
    common = ["routing.rate=0.5", "train.accumulation=2"]
    straight = train(run_of(*common), tmp_path / "straight", Listener())
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from squares import Killer\n"
        "from test_repa_training import run_of, train\n"
        f"train(run_of(*{common!r}), Path('run'), Killer({KILLED * BATCH}, 36))"
    )
    root = str(Path(__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert latest(tmp_path / "run").name == "samples-000000036"  # step 9
    resumed = train(run_of(*common), tmp_path / "run", Listener())
    for stem in ("model", "alignment", "ema-power", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert a == b, stem
    start = read_tensors(tmp_path / "straight" / "checkpoints" / "samples-000000000", "alignment")
    end = read_tensors(straight.checkpoint, "alignment")
    assert all(not torch.equal(start[name], end[name]) for name in start)
    moments = read_tensors(straight.checkpoint, "optimizer")
    assert {f"alignment.{name}/exp_avg" for name in end} <= set(moments)


def test_sampling_and_evaluation_load_no_projector(shards, tmp_path):
    result = train(run_of("budget.steps=2"), tmp_path / "run", Listener())
    names = set(load_model(result.checkpoint).model.state_dict())
    assert names == set(build(Architecture.of(run_of()), seed=0).state_dict())
    assert not any("projector" in name for stem in ("model", "ema-power") for name in read_tensors(result.checkpoint, stem))


def test_no_other_initial_value_moves(shards, tmp_path):
    first = {}
    for name, make in (("with", run_of), ("without", plain)):
        train(make("budget.steps=1"), tmp_path / name, Listener())
        first[name] = tmp_path / name / "checkpoints" / "samples-000000000"
    assert (first["with"] / "model.safetensors").read_bytes() == (first["without"] / "model.safetensors").read_bytes()
    assert not (first["without"] / "alignment.safetensors").exists()


def aligner(run):
    return ALIGNMENT.build(run.alignment, run, build(Architecture.of(run), seed=run.seed), device="cpu")


def test_the_projector_follows_the_seed_and_the_rule_of_the_rates(shards):
    one, again, other = aligner(run_of()), aligner(run_of("alignment.weight=1")), aligner(run_of("seed=1"))
    for (name, a), b, c in zip(one.state_dict().items(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c), name
    assert one.projector[0].weight.abs().max() <= 16**-0.5  # torch's law: 1 / sqrt(fan-in)
    assert fan_ins(one)["projector.0.weight"] == 16 and fan_ins(one)["projector.4.weight"] == 24


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_alignment_falls_and_is_logged_beside_the_loss(shards, tmp_path, rate):
    listener = Listener()
    lines = [f"routing.rate={rate}", "budget.steps=40", "train.log_every=16", "train.checkpoint_every=1000000"]
    train(run_of(*lines), tmp_path / "run", listener)
    series = list(listener.series("train/alignment").values())
    assert len(series) == 10 and all(-1 <= value <= 1 for value in series)
    assert series[-1] < series[0] - 0.2
    assert set(listener.series("train/alignment")) == set(listener.series("train/loss"))
    without = Listener()
    train(plain("budget.steps=1"), tmp_path / "plain", without)
    assert not without.series("train/alignment")
    assert without.series("val/loss")[0] == listener.series("val/loss")[0]  # validation knows nothing of the term


def test_the_logged_loss_is_the_objectives_and_the_weight_reaches_the_update(shards, tmp_path):
    """All runs see the same batch, noise and route: the first loss is the same, the second is not."""
    losses = []
    for name, run in (
        ("a", run_of("budget.steps=2")),
        ("b", run_of("alignment.weight=5", "budget.steps=2")),
        ("c", plain("budget.steps=2")),
    ):
        listener = Listener()
        train(run, tmp_path / name, listener)
        losses.append(listener.series("train/loss"))
    assert losses[0][4] == losses[1][4] == losses[2][4]
    assert len({series[8] for series in losses}) == 3


def test_a_teacher_that_is_not_there_is_one_line(shards, tmp_path):
    with pytest.raises(AssetError, match=r"teacher\.path=nowhere: no such folder") as error:
        train(compose([*NANO, "alignment=repa", "teacher.path=nowhere"]), tmp_path / "run", Listener())
    assert "\n" not in str(error.value)
