"""The coordinate check: what it watches, what it computes, and that it tells rules apart."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdm.config.compose import compose
from hdm.config.errors import ConfigError, HdmError
from hdm.coordcheck import command
from hdm.model import Architecture, build
from hdm.train.coordinates import Coordinates, measure, watched

SMALL = ["model.depth=1", "model.dec_blocks=1"]


@given(
    power=st.floats(-2, 2), scale=st.floats(1e-6, 1e3), widths=st.lists(st.integers(1, 4096), min_size=2, max_size=6, unique=True)
)
def test_the_slope_of_a_power_law_is_its_exponent(power, scale, widths):
    result = Coordinates(widths=widths, changes={"part": [[1.0] * len(widths), [scale * width**power for width in widths]]})
    assert result.slope("part") == pytest.approx(power, abs=1e-6)
    if abs(abs(power) - 0.2) > 1e-3:
        assert result.failing() == (["part"] if abs(power) > 0.2 else [])


def test_what_never_moves_has_no_slope_and_what_explodes_fails():
    result = Coordinates(widths=[1, 2], changes={"still": [[0.0, 0.0]], "half": [[0.0, 1.0]], "wild": [[1.0, math.inf]]})
    assert result.slope("still") is None
    assert result.failing() == ["half", "wild"]


def test_every_sublayer_and_embedding_is_watched():
    model = build(Architecture.of(compose(["model=nano", "adaln=hyper"])), seed=None)
    rows = watched(model)
    sublayers = {f"{stage}.{kind}" for stage in ("pre", "encoder", "decoder", "post") for kind in ("attn", "mlp")}
    whole = {"patch", "time", "aspect", "text", "adaln", "out", "pre", "encoder", "decoder", "post"}
    assert set(rows.values()) == sublayers | whole | {"decoder.merge", "adaln.layers"}
    assert rows["decoder.1.0.merge"] == "decoder.merge"
    blocks = [name for name, row in rows.items() if row in {"pre", "encoder", "decoder", "post"}]
    assert len(blocks) == 1 + 2 * 1 + 2 * 2 + 1


@pytest.mark.slow
def test_the_rule_of_the_report_passes_and_one_rate_for_all_fails(tmp_path, capsys):
    common = [*SMALL, "widths=64,128,256", "seeds=4"]
    assert command([*common, f"out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "passed: no part's change depends on the width" in printed
    report = json.loads((tmp_path / "coordcheck.json").read_text())
    assert report["passed"]
    assert report["chosen"]["failing"] == []
    assert (tmp_path / "coordcheck.png").stat().st_size > 10_000
    # Without a rule a d x d layer turns aligned inputs into a change that grows with d.
    slopes = report["control"]["slopes"]
    assert min(slopes["time"], slopes["aspect"]) > 0.8
    assert slopes["pre.mlp"] > 0.4
    assert abs(slopes["patch"]) < 0.2  # it reads four channels at any width
    assert {"pre.mlp", "adaln"} < set(report["control"]["failing"])
    assert len(report["control"]["failing"]) >= 5

    rate = ["optimizer.rule=constant", "optimizer.lr=0.004"]
    assert command([*SMALL, *rate, "widths=64,256", "seeds=1", f"out={tmp_path}"]) == 1
    assert "FAILED: the change of" in capsys.readouterr().out


def test_before_the_zero_layers_have_moved_only_decay_moves_the_time_embedding():
    """The zero layers behind it let no gradient through; from the second step on it moves, at the same pace at every width."""
    run = compose(["model=nano", *SMALL])
    run.optimizer.weight_decay = 0.0
    result = measure(run, run.optimizer, widths=[64, 128], steps=2, seeds=1)
    assert result.changes["time"][0] == [0.0, 0.0]
    assert abs(result.slope("time")) < 0.2


@pytest.mark.slow
def test_behind_layers_of_zeros_epsilon_alone_breaks_the_law():
    """Text in mmdit is seen through gates that start at zero: its gradients are as small as Adam's usual epsilon."""
    run = compose(["model=nano", *SMALL, "backbone=mmdit"])
    slopes = []
    for run.optimizer.eps in (1e-8, 1e-20):
        slopes.append(measure(run, run.optimizer, widths=[64, 256], steps=8, seeds=1).slope("stack.text_mlp"))
    assert abs(slopes[1]) < 0.2
    assert slopes[0] < slopes[1] - 0.15


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("widths=64", "needs two different widths"),
        ("widths=64,100", r"width 100: .*choose a multiple of 32"),
        ("widths=64,wide", "widths=wide: must be a whole number"),
        ("rate=0", "rate=0: must be a number above 0"),
        ("steps=0", "steps=0: must be a whole number above 0"),
        ("merge=no_such", "no such variant"),
    ],
)
def test_bad_input_is_one_line(bad, words):
    with pytest.raises((HdmError, ConfigError), match=words) as error:
        command([bad])
    assert "\n" not in str(error.value)
