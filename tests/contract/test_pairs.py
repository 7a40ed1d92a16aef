"""Every pair of variants of two model axes that is not refused makes a network that trains. What one variant owes alone is in
tests/model/test_contract.py; a plugin's variants take part with `-p my_lab.merges`.

A network chooses on ten axes and so holds 45 pairs: `cover` finds few that hold all. Where one fails, its pairs are tried one by
one, with what is nearest to the defaults around them, so that the message names the culprit."""

import pytest
import torch
from cover import cover, pairs
from nano import MODEL_AXES, architecture, inputs, perturb, published, shapes_unchecked

from hdm.config import compat
from hdm.config.axes import discover
from hdm.model import Architecture, build

VARIANTS = {axis: list(discover()[axis].variants.values()) for axis in MODEL_AXES}
NETWORKS = cover(VARIANTS)
TINY = {"depth": 1, "dec_blocks": 1}


def test_the_networks_hold_every_pair(record_property):
    allowed = [pair for pair in pairs(VARIANTS) if compat.allowed(*pair)]
    held = [pair for choices, _ in NETWORKS for pair in pairs({axis: [v] for axis, v in choices.items()})]
    assert {frozenset(map(compat.key, pair)) for pair in allowed} == {frozenset(map(compat.key, pair)) for pair in held}
    assert sum(len(first) for _, first in NETWORKS) == len(allowed)
    record_property("refused", len(list(pairs(VARIANTS))) - len(allowed))


@pytest.mark.parametrize(("choices", "first"), NETWORKS, ids=range(len(NETWORKS)))
def test_every_allowed_pair_trains(choices, first, record_property):
    record_property("pairs", len(first))
    implied = published(choices["backbone"].name)
    chosen = {axis: v.name for axis, v in choices.items() if axis == "backbone" or v.config is not type(getattr(implied, axis))}
    try:
        hold(architecture(size=sizes(choices), **chosen))
    except Exception as error:
        for a, b in pairs({axis: [v] for axis, v in choices.items()}):
            try:
                hold(architecture(size=sizes({a.axis: a, b.axis: b}), **{a.axis: a.name, b.axis: b.name}))
            except Exception as again:
                raise AssertionError(f"{compat.key(a)} {compat.key(b)}: {type(again).__name__}: {again}") from again
        raise AssertionError(f"all of {' '.join(map(compat.key, choices.values()))}: {type(error).__name__}: {error}") from error


def sizes(choices):
    """Four blocks, one each before, down, up and behind; hdit has four in its outer level alone."""
    return TINY | {"post_depth": 2} if "backbone" in choices and choices["backbone"].name == "hdit" else TINY


def hold(made: Architecture) -> None:
    """Forward and backward at two sizes, lengths and aspect ratios, routed and not; the same again from the same weights."""
    assert not list(compat.refusals(compat.chosen(made).values())), "the other axes hold nothing that goes with the pair"
    with shapes_unchecked():
        model, again = perturb(build(made, seed=0)), build(made, seed=None)
        again.load_state_dict(model.state_dict(), assign=True)
    for grid, batch, text, routed in (((4, 4), 2, 3, True), ((2, 8), 1, 5, False)):
        given = inputs(model, grid=grid, batch=batch, text=text)
        out = given.run(model, routed=routed)
        assert out.shape == given.x.shape
        with shapes_unchecked():
            assert torch.equal(out, given.run(again, routed=routed)), "depends on more than weights and inputs"
        out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} takes no part"
        assert p.grad.isfinite().all(), f"{name}: gradient is not finite"
