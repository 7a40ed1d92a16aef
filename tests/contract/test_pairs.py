"""Every pair of variants of two model axes that is not refused makes a network that trains. What one variant owes alone is in
tests/model/test_contract.py; a plugin's variants take part with `-p my_lab.merges`."""

from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from nano import MODEL_AXES, architecture, inputs, perturb

from hdm.config import compat
from hdm.config.axes import discover
from hdm.model import build

TINY = {"depth": 1, "dec_blocks": 1, "post_depth": 2}  # five blocks: hdit has four in its outer level
AXES = discover()
GROUPS = [(variant, AXES[other]) for axis, other in combinations(MODEL_AXES, 2) for variant in AXES[axis].variants.values()]


@pytest.mark.parametrize(("variant", "axis"), GROUPS, ids=lambda value: compat.key(value) if hasattr(value, "axis") else value.name)
def test_every_allowed_pair_trains(variant, axis, record_property):
    partners = [other for other in axis.variants.values() if compat.allowed(variant, other)]
    record_property("pairs", len(partners))
    record_property("refused", len(axis.variants) - len(partners))
    for other in partners:
        try:
            hold(**{variant.axis: variant.name, other.axis: other.name})
        except Exception as error:
            raise AssertionError(f"{compat.key(variant)} {compat.key(other)}: {type(error).__name__}: {error}") from error


def hold(**pair: str) -> None:
    """Forward and backward at two sizes, lengths and aspect ratios, routed and not; the same again from the same weights."""
    made = architecture(size=TINY, **pair)
    assert not list(compat.refusals(compat.chosen(made).values())), "the other axes hold nothing that goes with the pair"
    model, again = perturb(build(made, seed=0)), build(made, seed=1)
    again.load_state_dict(model.state_dict())
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


@contextmanager
def shapes_unchecked():
    """Without jaxtyping's checks, for what was checked a moment ago: they cost as much as these small networks."""
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
