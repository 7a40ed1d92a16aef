"""Every pair of variants that is refused, of all axes: the message names both, and what it says to use instead works."""

import dataclasses
import re
from functools import cache
from itertools import combinations

import pytest

from hdm.config import compat
from hdm.config.axes import AXES, BACKBONE, discover
from hdm.config.compose import compose
from hdm.config.errors import ConfigError

discover()
PAIRS = [
    (a, b)
    for first, second in combinations(AXES.values(), 2)
    for a in first.variants.values()
    for b in second.variants.values()
    if not compat.allowed(a, b)
]
every_refused_pair = pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{compat.key(a)} {compat.key(b)}" for a, b in PAIRS])


@cache
def published(backbone):
    return compose(["experiment=none", f"backbone={backbone}"])


def surrounded(a, b):
    """The pair with the nearest variants on the other axes that go with either."""
    backbone = next((v.name for v in (a, b) if v.axis == "backbone"), BACKBONE.default)
    return compat.completed({a.axis: a, b.axis: b}, compat.chosen(published(backbone)))


def run_of(choices):
    """The run that composing `choices` would make, but for the hundreds of milliseconds of hydra."""
    base = published(choices["backbone"].name)
    others = {axis: v.config() for axis, v in choices.items() if v.config is not type(getattr(base, axis))}
    return dataclasses.replace(base, **others)


def refused(choices):
    with pytest.raises(ConfigError) as caught:
        compat.check(run_of(choices))
    return str(caught.value)


@every_refused_pair
def test_the_message_names_both_sides_and_a_remedy_that_works(a, b):
    choices = surrounded(a, b)
    message = refused(choices)
    assert compat.key(a) in message
    assert compat.key(b) in message
    assert "\n" not in message
    said, _, advice = message.partition("; use ")
    remedies = re.fullmatch(r"(\w+=\w+)(?:, or (\w+=\w+))?", advice)
    assert remedies, message
    assert re.search(r"^\w+=\w+: needs .+ \(.+\), which \w+=\w+ takes away \(.+\)$", said)
    for remedy in filter(None, remedies.groups()):
        axis, _, name = remedy.partition("=")
        assert axis in (a.axis, b.axis)
        compat.check(run_of({**choices, axis: AXES[axis].get(name)}))


@pytest.mark.parametrize("trait", sorted({compat.refusal(a, b).trait for a, b in PAIRS}))
def test_the_command_line_says_the_same_and_takes_the_remedy(trait):
    a, b = next(pair for pair in PAIRS if compat.refusal(*pair).trait == trait)
    lines = {axis: v.name for axis, v in surrounded(a, b).items() if v.name != AXES[axis].default or v in (a, b)}
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=none", *(f"{axis}={name}" for axis, name in lines.items())])
    assert str(caught.value) == refused(surrounded(a, b))
    for remedy in re.findall(r"\w+=\w+", str(caught.value).partition("; use ")[2]):
        axis, _, name = remedy.partition("=")
        compose(["experiment=none", *(f"{axis}={name}" for axis, name in {**lines, axis: name}.items())])


def test_what_a_backbone_implies_goes_together_and_names_its_axes():
    for variant in BACKBONE.variants.values():
        implied = getattr(variant.config, "implies", {})
        assert not list(compat.refusals(compat.chosen(published(variant.name)).values())), variant.name
        for key in implied:
            axis, _, field = key.partition(".")
            assert not field or axis not in AXES or axis in implied, f"{key}: imply {axis} too, or the field may not be there"
