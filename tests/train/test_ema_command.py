"""`python -m hdm.ema`: averages of other widths written and measured, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from squares import Listener

from hdm.config.errors import HdmError
from hdm.ema import command
from hdm.train.checkpoint import load_model, read_tensors
from hdm.train.loop import train


@pytest.fixture
def trained(nano, tmp_path):
    """A run of 24 steps with eight snapshots, and its listener."""
    listener = Listener()
    train(nano("budget.steps=24", "ema.snapshot_every=12", "optimizer.lr=0.05"), tmp_path / "run", listener)
    return tmp_path / "run", listener


def test_written_averages_are_checkpoints_that_every_command_takes(trained, capsys):
    folder, _ = trained
    command([f"ckpt={folder}", "width=0.07,0.1"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folder}/ema/0.07  at 96 samples; ")
    assert printed[1] == f"{folder}/ema/0.1  at 96 samples; 0.00% of the profile is missing"
    written, direct = load_model(folder / "ema" / "0.07"), load_model(folder, weights="ema:0.07")
    assert (written.samples, written.weights, written.run.ema.power) == (96, "ema-power", 0.07)
    for a, b in zip(written.model.parameters(), direct.model.parameters(), strict=True):
        assert torch.equal(a, b)
    stored = read_tensors(folder / "checkpoints" / "samples-000000096", "ema-power")  # of width 0.1, tracked in training
    for name, tensor in load_model(folder / "ema" / "0.1").model.named_parameters():
        assert torch.equal(tensor, stored[name])
    command([f"ckpt={folder}", "width=0.1", "at=60", "out=earlier"])
    assert load_model("earlier/0.1-at-60").samples == 60
    assert [path.name for path in Path("earlier").iterdir()] == ["0.1-at-60"]


def test_a_sweep_finds_the_loss_that_training_found(trained, capsys):
    folder, listener = trained
    command([f"ckpt={folder}", "sweep", "width=0.05,0.1,0.14"])
    report = json.loads((folder / "ema" / "sweep-000000096.json").read_text())
    losses = {row["width"]: row["val/loss"] for row in report["widths"]}
    assert list(losses) == [0.05, 0.1, 0.14]
    assert losses[0.1] == pytest.approx(listener.series("val/loss")[96], rel=1e-6)  # ema.power
    assert report["val/loss_raw"] == pytest.approx(listener.series("val/loss_raw")[96], rel=1e-6)
    assert len(set(losses.values())) == 3
    out = capsys.readouterr().out
    assert f"{losses[0.05]:.5f}" in out
    assert (folder / "ema" / "sweep-000000096.png").stat().st_size > 5000
    command([f"ckpt={folder}", "sweep"])  # a list of its own, without what cannot be made of eight snapshots
    swept = [row["width"] for row in json.loads((folder / "ema" / "sweep-000000096.json").read_text())["widths"]]
    assert {0.05, 0.1} < set(swept)
    assert 0.02 not in swept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "ckpt= is missing"),
        (["ckpt=run"], "width= is missing"),
        (["ckpt=run", "width=0.07", "model.dim=3"], "'model.dim=3' is not understood"),
        (["ckpt=run", "sweep", "model.dim=3"], "belongs to the trained run"),
        (["ckpt=run", "width=0.07,x"], "width=0.07,x: 'x' is no width"),
        (["ckpt=run", "width=0.3"], "'0.3' is no width of a power-function average; name a number above 0, 0.28 or less"),
        (["ckpt=run", "width=0.07", "at=soon"], "at=soon: must be a whole number"),
        (["ckpt=nowhere", "width=0.07"], "ckpt=nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(HdmError) as error:
        command(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_run_does_not_hold_is_refused(trained):
    folder, _ = trained
    for arguments, words in (
        (["width=0.07", "at=61"], "at=61: no average was stored then; there are 12, 24, 36, 48, 60, 72, 84, 96"),
        (["width=0.01"], "width 0.01: what is stored up to 96 samples misses"),
        (["sweep", "at=12", "width=0.2"], "width 0.2: what is stored up to 12 samples misses"),
    ):
        with pytest.raises(HdmError) as error:
            command([f"ckpt={folder}", *arguments])
        assert words in str(error.value)
        assert "\n" not in str(error.value)
