"""Progressive stages: what each sees and learns with, where they begin and end, and kill -9 anywhere in between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from squares import NANO, Listener, write_tar

from hdm.config.compose import compose, flatten, from_flat, stage_run
from hdm.config.errors import ConfigError, DataError
from hdm.data.loader import training_batches
from hdm.data.sources.folder import WebDataset
from hdm.train.budget import Clock
from hdm.train.checkpoint import latest, load_model
from hdm.train.loop import train
from hdm.train.stages import stages

THREE = [
    "budget.steps=null", "validation.samples=2", "train.log_every=4", "train.checkpoint_every=12", "train.keep_checkpoints=1",
    "stages.a.steps=5", "stages.a.crop.size=16", "stages.a.optimizer.lr=0.5", "stages.a.routing.rate=0.5",
    "stages.b.epochs=1", "stages.b.crop.size=20", "stages.b.optimizer.lr=0.1", "stages.b.train.batch_size=8",
    "stages.b.train.accumulation=2", "stages.b.optimizer.betas=[0.9,0.99]",
    "stages.c.images=21", "stages.c.epochs=1.5", "stages.c.crop.size=24", "stages.c.routing.rate=0.0",
    "stages.c.text_encoder.max_length=2", "stages.c.model.gradient_checkpointing=true", "stages.c.moments=keep",
]  # fmt: skip
ENDS = [20, 20 + 24, 20 + 24 + 28]  # 5 x 4; 24 images, 3 batches of 8; floor(21 / 4 whole batches x 1.5) = 7 batches of 4


def staged(*overrides):
    return compose([*NANO, *THREE, *overrides])


def images(_):
    return 24


def test_where_stages_begin_and_end():
    a, b, c = stages(staged(), images)
    assert [(s.start, s.end, s.total) for s in (a, b, c)] == [(0, 20, 72), (20, 44, 72), (44, 72, 72)]
    assert [s.first_step for s in (a, b, c)] == [0, 5, 8]
    assert [s.last for s in (a, b, c)] == [False, False, True]
    assert b.progress(Clock(samples=32)) == 0.5
    assert b.fraction(Clock(samples=36)) == 0.5
    assert [b.over(Clock(samples=n)) for n in (43, 44)] == [False, True]
    assert [(s.run.crop.size, s.run.routing.rate, s.run.text_encoder.max_length) for s in (a, b, c)] == [
        (16, 0.5, 64), (20, 0.5, 64), (24, 0.0, 2)
    ]  # fmt: skip


def test_a_budget_may_end_a_run_with_stages_early():
    a, b, _ = stages(staged("budget.samples=30"), images)
    assert not a.over(Clock(samples=16))
    assert b.over(Clock(samples=32))
    assert b.fraction(Clock(samples=15)) == 0.5


def test_stages_survive_the_way_through_a_flat_configuration():
    run = staged("stages.b.optimizer.lr=0.2")
    again = from_flat(json.loads(json.dumps(flatten(run))), ["stages.c.epochs=3"])
    assert [s.set for s in again.stages] == [s.set for s in run.stages]
    assert [s.epochs for s in again.stages] == [None, 1.0, 3.0]
    assert stage_run(again, again.stages[1]).optimizer.lr == 0.2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.b.crop.siz=3"], r"stages\.b\.crop\.siz=3: .* did you mean 'crop\.size'"),
        (["stages.b.crop.size=18"], r"stages\.b\.crop\.size=18: is not a positive multiple .* set crop\.size=16"),
        (["stages.b.model.dim=32"], r"stages\.b\.model\.dim=32: is the same in all stages; set model\.dim for the whole run"),
        (["stages.b.routing=none"], r"stages\.b\.routing=none: is the same in all stages"),
        (["stages.b.datasets=x"], r"stages\.b\.datasets=x: is the same in all stages"),
        (["stages.b.epoch=3"], r"stages\.b\.epoch=3: no such key 'epoch'; did you mean 'epochs'"),
        (["stages.b.steps=3"], r"stages\.b: set one of stages\.b\.epochs and stages\.b\.steps, and the other to null"),
        (["stages.b.epochs=-1"], r"stages\.b\.epochs=-1\.0: must be above 0"),
        (["stages=[{name:x,steps:1},{name:x,steps:1}]"], r"stages: 'x' must be a name of its own"),
    ],
)  # fmt: skip
def test_bad_stages_get_one_clear_line(overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        staged(*overrides)
    assert "\n" not in str(error.value)


def test_what_every_stage_of_an_experiment_sets_cannot_be_set_from_above():
    words = r"optimizer\.lr=1: every stage sets its own; set stages\.256px\.optimizer\.lr=1, and so on"
    with pytest.raises(ConfigError, match=words):
        compose(["experiment=xut_base_full", "optimizer.lr=1"])


def test_a_stage_that_would_change_the_network_is_refused_before_anything_is_trained(shards, tmp_path, listener):
    run = staged("routing=deferred_mask", "stages.c.routing.mixer=3")
    with pytest.raises(ConfigError, match=r"stages\.c: .* mixer\.\d.*, which the first stage does not"):
        train(run, tmp_path / "run", listener)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_every_stage_sees_its_own_data_in_an_order_of_its_own(shards):
    run = staged()
    data = WebDataset(run.data).open(Path("datasets"), "train")
    first = [key for batch, _ in zip(training_batches(run, data, start=0, batch_size=4), range(6)) for key in batch.keys]
    moved = training_batches(run, data, start=20, batch_size=4, origin=20)
    second = [key for batch, _ in zip(moved, range(6)) for key in batch.keys]
    assert sorted(first) == sorted(second) == sorted(set(first))  # whole epochs of 24 both
    assert first != second
    late = training_batches(run, data, start=28, batch_size=4, origin=20)
    assert next(late).keys == second[8:12]


def test_parts_of_a_micro_batch_make_it_whole(shards):
    run = staged("crop=arb", "crop.step=4")
    data = WebDataset(run.data).open(Path("datasets"), "train")
    whole = [batch for batch, _ in zip(training_batches(run, data, start=0, batch_size=4), range(6))]
    parts = [training_batches(run, data, start=0, batch_size=4, part=(r, 2)) for r in (0, 1)]
    for expected in whole:
        one, two = next(parts[0]), next(parts[1])
        assert one.index + two.index == expected.index
        assert torch.equal(torch.cat([one.pixels, two.pixels]), expected.pixels)
        assert torch.equal(torch.cat([one.view, two.view]), expected.view)
        assert one.captions + two.captions == expected.captions


def test_what_a_run_with_stages_leaves(shards, tmp_path, listener):
    result = train(staged(), tmp_path / "run", listener)
    assert (result.status, result.samples) == ("finished", ENDS[-1])
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [0, *ENDS]  # the first, each stage's last; train.keep_checkpoints=1 is the last
    assert [load_model(tmp_path / "run" / "checkpoints" / f"samples-{n:09d}").run.crop.size for n in ENDS] == [16, 20, 24]
    stage = listener.series("train/stage")
    assert {n: stage[n] for n in (20, 44, 72)} == {20: 0.0, 44: 1.0, 72: 2.0}
    rates = listener.series("train/lr")
    assert rates[4] == pytest.approx(0.25)  # warm-up of two steps, in every stage
    assert rates[28] == pytest.approx(0.05)
    assert rates[48] == pytest.approx(0.25)  # the third takes the rate of the run
    assert load_model(tmp_path / "run").run.text_encoder.max_length == 2


def test_moments_are_reset_or_kept(shards, tmp_path):
    def moments(policy, folder):
        train(staged(f"stages.b.moments={policy}", "stages.b.steps=1", "stages.b.epochs=null"), folder, Listener())
        state = load_file(folder / "checkpoints" / "samples-000000028" / "optimizer.safetensors")
        return state["patch.proj.weight/step"].item()

    assert moments("reset", tmp_path / "reset") == 1.0
    assert moments("keep", tmp_path / "keep") == 6.0


def test_averages_and_weights_carry_over(shards, tmp_path):
    run = staged("stages.b.optimizer.lr=1e-30", "stages.b.optimizer.weight_decay=0", "stages.c.optimizer.lr=1e-30")
    train(run, tmp_path / "run", Listener())
    a, b = (load_file(tmp_path / "run" / "checkpoints" / f"samples-{n:09d}" / "model.safetensors") for n in ENDS[:2])
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (load_file(tmp_path / "run" / "checkpoints" / f"samples-{n:09d}" / "ema-power.safetensors") for n in ENDS[:2])
    assert any(not torch.equal(a[name], b[name]) for name in a)  # it goes on averaging, towards the weights


def killed(overrides, samples, checkpoint):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from squares import Killer\n"
        "from test_stages import staged, train, Path\n"
        f"train(staged(*{overrides!r}), Path('run'), Killer({samples}, {checkpoint}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert latest(Path("run")).name == f"samples-{checkpoint:09d}"


def test_killed_in_two_stages_and_equal_to_the_bit(shards, tmp_path):
    """Once before the first switch, once right behind the second, with other numbers of workers."""
    straight = train(staged(), tmp_path / "straight", Listener())
    killed(["train.workers=0"], 16, 12)
    killed(["train.workers=2"], 48, 44)
    listener = Listener()
    resumed = train(staged("train.workers=1"), tmp_path / "run", listener)
    assert listener.rewound == [44]
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        one, other = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert one == other, stem


def test_a_stage_does_not_go_on_with_other_data_but_begins_with_its_own(shards, tmp_path):
    write_tar(Path("other") / "train.tar", 20)
    write_tar(Path("other") / "val.tar", 8)
    other = ["stages.b.data.path=other"]
    train(staged(*other, "budget.samples=28"), tmp_path / "run", Listener())
    assert latest(tmp_path / "run").name == "samples-000000028"
    write_tar(Path("other") / "train.tar", 16)
    with pytest.raises(DataError, match=r"samples-000000028: the training data have changed"):
        train(staged(*other), tmp_path / "run", Listener())
