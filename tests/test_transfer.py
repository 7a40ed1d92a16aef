"""The verdict on learning rates across widths: made up losses whose answer is known, sweeps as they are written, one real sweep."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdm.config.compose import compose
from hdm.config.errors import ConfigError, HdmError
from hdm.config.identity import run_name
from hdm.model import Architecture
from hdm.model.width import at_width
from hdm.sweep import parse
from hdm.transfer import Curves, command, judge

RATES = [2.0**k for k in range(-3, 4)]


def curves(best, *, widths=(32, 64, 128), rates=RATES, seeds=2, gain=1.0, unfinished=0):
    """Parabolas in log2 of the rate, lowest at `best[width]`; doubling the width takes `gain` off."""
    losses = {
        width: {rate: [5 - gain * i + 0.1 * math.log2(rate / best[width]) ** 2 + 0.01 * s for s in range(seeds)] for rate in rates}
        for i, width in enumerate(widths)
    }
    return Curves(title="made up", losses=losses, unfinished=unfinished)


def same(widths=(32, 64, 128), rate=0.5):
    return dict.fromkeys(widths, rate)


def test_equal_best_rates_transfer():
    verdict = judge(curves(same()))
    assert verdict.transfers is True
    assert verdict.words == (
        "transfers: the best rates (0.5 at width 32, 0.5 at width 64, 0.5 at width 128) lie 0 octaves apart;"
        " wider is better at every rate up to 0.5"
    )
    assert judge(curves({32: 1.0, 64: 0.5, 128: 0.5})).transfers is True  # one octave


def test_best_rates_that_move_do_not():
    verdict = judge(curves({32: 2.0, 64: 1.0, 128: 0.5}))
    assert verdict.transfers is False
    assert "does not transfer: the best rates (2 at width 32, 1 at width 64, 0.5 at width 128) lie 2 octaves apart" in verdict.words


def test_neither_does_a_wider_network_that_is_worse():
    verdict = judge(curves(same(), gain=-0.02))
    assert verdict.transfers is False
    assert "wider is not better in 6 of 6 comparisons up to 0.5 (at 0.125: " in verdict.words  # 0.125, 0.25, 0.5 of two pairs


@pytest.mark.parametrize(
    ("given_curves", "words"),
    [
        (curves(same((32, 64)), widths=(32, 64)), "2 widths, 3 are needed"),
        (curves(same(), rates=RATES[:4]), "4 rates, 5 are needed"),
        (curves(same(), seeds=1), "1 seed, 2 are needed"),
        (curves(same(), unfinished=3), "3 arms are not finished"),
        (curves(same(), rates=[4.0**k for k in range(-3, 4)]), "rates are more than an octave apart"),
        (curves(same(rate=16.0)), "the best rate at width 32 is the end of the grid, 8; add higher ones"),
        (curves({32: 0.5, 64: 0.5, 128: 0.01}), "the best rate at width 128 is the end of the grid, 0.125; add lower ones"),
    ],
)
def test_what_a_sweep_cannot_say(given_curves, words):
    verdict = judge(given_curves)
    assert verdict.transfers is None
    assert verdict.words.startswith("cannot be said: ")
    assert words in verdict.words


@given(best=st.floats(0.2, 5), scale=st.floats(0.5, 2))
def test_the_vertex_is_that_of_the_parabola(best, scale):
    found = curves(same(rate=best), rates=[rate * scale for rate in RATES])
    if found.rates[0] < found.best(32) < found.rates[-1]:
        assert found.vertex(32) == pytest.approx(best, rel=1e-6)


def test_a_run_that_diverged_is_infinitely_bad():
    found = curves(same())
    found.losses[32][8.0][1] = math.inf
    assert judge(found).transfers is True
    found.losses[128][0.5][0] = math.inf
    assert judge(found).transfers is False


def written(folder, *, rows):
    folder.mkdir()
    with open(folder / "table.csv", "w", newline="") as file:
        keys = ["model.width", "optimizer.lr", "seed", "status", "reason", "folder", "val/loss"]
        writer = csv.DictWriter(file, keys, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def rows(best, **status):
    table = curves(best).losses
    return [
        {"model.width": w, "optimizer.lr": rate, "seed": s, "status": "finished", "folder": "gone", "val/loss": loss} | status
        for w, row in table.items()
        for rate, cell in row.items()
        for s, loss in enumerate(cell)
    ]


def test_two_sweeps_in_one_figure(tmp_path, capsys):
    good = written(tmp_path / "good", rows=rows(same()))
    bad = rows({32: 2.0, 64: 1.0, 128: 0.5})
    bad[-1] |= {"status": "failed", "reason": "step 3: the loss is not finite", "val/loss": 1.0}
    command([f"sweep={good}", f"sweep={written(tmp_path / 'bad', rows=bad)}", f"out={tmp_path / 'f.png'}"])
    printed = capsys.readouterr().out
    assert "\ntransfers: " in printed
    assert "\ndoes not transfer: " in printed
    report = json.loads((tmp_path / "f.json").read_text())["sweeps"]
    assert [sweep["transfers"] for sweep in report] == [True, False]
    assert report[1]["losses"]["128"]["8"][1] == math.inf
    assert report[0]["best"]["64"] == {"rate": 0.5, "vertex": pytest.approx(0.5)}
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    assert pixels.std() > 10
    assert (tmp_path / "f.png").stat().st_size < 100_000
    killed = rows(same())
    killed[0] |= {"status": "interrupted", "val/loss": ""}
    command([f"sweep={written(tmp_path / 'killed', rows=killed)}"])
    assert "cannot be said: 1 seed, 2 are needed; 1 arms are not finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "sweep= is missing"),
        (["sweep=nowhere"], "sweep=nowhere: holds no table.csv"),
        (["sweep=here", "width=model.dim"], "has no column 'model.dim'"),
        (["sweep=here", "rate=status"], "status=finished is no number"),
        (["sweep=here", "out=f.pdf"], "out=f.pdf: must end in .png"),
        (["sweep=here", "wide=3"], "'wide=3' is not understood"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    written(tmp_path / "here", rows=rows(same()))
    with pytest.raises(HdmError) as error:
        command(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- the key that widths are swept by ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3, 40])
def test_a_width_moves_heads_and_mlp_along(heads):
    run = compose(["model=nano", f"model.width={32 * heads}"])
    m = run.model
    assert (m.width, m.dim, m.heads, m.head_dim, m.mlp_dim) == (None, 32 * heads, heads, 32, 96 * heads)
    assert Architecture.of(run) == at_width(Architecture.of(compose(["model=nano"])), 32 * heads)


def test_a_width_is_the_same_run_as_its_sizes():
    by_width, by_sizes = (
        run_name(compose(["model=nano", "budget.steps=1", *words]))
        for words in (["model.width=32"], ["model.dim=32", "model.heads=1", "model.mlp_dim=96"])
    )
    assert by_width == by_sizes


@pytest.mark.parametrize("width", ["100", "0", "-32"])
def test_a_width_that_there_is_not(width):
    with pytest.raises(ConfigError, match=rf"model\.width={width}: .*choose a multiple of 32"):
        compose(["model=nano", f"model.width={width}"])


@pytest.mark.parametrize("name", ["lr_transfer", "lr_transfer_constant"])
def test_the_sweeps_of_the_laboratory_can_answer(name):
    sweep = parse([f"sweep={name}"])
    axes = sweep.axes
    widths, rates = ([float(c.value) for c in axes[key].choices] for key in ("model.width", "optimizer.lr"))
    assert judge(curves(same(widths, rates[2]), widths=widths, rates=rates, seeds=len(sweep.seeds))).transfers is True
    assert {arm.run.model.dim for arm in sweep.arms} == set(widths)
