"""Compatibility as data: messages, computed remedies, adapters. The axes and variants are the test's own."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hdm.config import compat
from hdm.config.axes import AXES, discover
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.registry import Axis
from hdm.config.traits import Trait


@dataclass(kw_only=True, slots=True)
class EverywhereConfig:
    """Attends everywhere."""


@dataclass(kw_only=True, slots=True)
class NearConfig:
    """Attends to neighbours."""

    needs: ClassVar[dict[str, str]] = {"grid": "its windows are cut from it"}


@dataclass(kw_only=True, slots=True)
class FlexibleConfig:
    """Attends to neighbours, wherever they are."""

    needs: ClassVar[dict[str, str]] = {"grid": "its windows are cut from it"}
    adapts: ClassVar[dict[str, str]] = {"grid": "windows hold the tokens that stayed"}


@dataclass(kw_only=True, slots=True)
class DropConfig:
    """Drops tokens."""

    takes: ClassVar[dict[str, str]] = {"grid": "tokens bypass"}


@dataclass(kw_only=True, slots=True)
class DropMoreConfig(DropConfig):
    """Drops more tokens."""


@dataclass(kw_only=True, slots=True)
class KeepConfig:
    """Keeps all tokens."""

    takes: ClassVar[dict[str, str]] = {"route": "there is none"}


@dataclass(kw_only=True, slots=True)
class PlainConfig:
    """Steers with all tokens."""


@dataclass(kw_only=True, slots=True)
class WeakConfig:
    """Steers away from fewer tokens."""

    needs: ClassVar[dict[str, str]] = {"route": "its weak pass has fewer tokens"}


class Run:
    def __init__(self, **configs):
        self.__dict__.update(configs)


@pytest.fixture
def axes(monkeypatch):
    """Three axes; the default stands neither first nor last in its file."""
    made = {
        "look": Axis("look", "", default="everywhere"),
        "lose": Axis("lose", "", default="drop"),
        "steer": Axis("steer", "", default="plain"),
    }
    for axis, name, config in (
        ("look", "near", NearConfig),
        ("look", "everywhere", EverywhereConfig),
        ("look", "flexible", FlexibleConfig),
        ("lose", "more", DropMoreConfig),
        ("lose", "drop", DropConfig),
        ("lose", "keep", KeepConfig),
        ("steer", "weak", WeakConfig),
        ("steer", "plain", PlainConfig),
    ):
        made[axis].register(name, config)(type(name, (), {}))
    monkeypatch.setattr(compat, "AXES", made)
    return made


def test_a_refusal_names_both_sides_why_how_and_what_works(axes):
    with pytest.raises(ConfigError) as caught:
        compat.check(Run(look=NearConfig(), lose=DropConfig(), steer=PlainConfig()))
    assert str(caught.value) == (
        "look=near: needs the complete grid of image tokens inside the blocks (its windows are cut from it), which lose=drop takes"
        " away (tokens bypass); use lose=keep, or look=everywhere"
    )


def test_a_remedy_goes_with_everything_else_that_is_chosen(axes):
    """With steer=weak, lose=keep would only be refused next; look=everywhere alone works."""
    with pytest.raises(ConfigError, match=r"; use look=everywhere$"):
        compat.check(Run(look=NearConfig(), lose=DropConfig(), steer=WeakConfig()))


def test_a_remedy_of_one_pair_when_several_are_at_odds(axes):
    axes["look"].variants.pop("everywhere")
    axes["look"].variants.pop("flexible")
    with pytest.raises(ConfigError, match=r"; use lose=keep$"):
        compat.check(Run(look=NearConfig(), lose=DropConfig(), steer=WeakConfig()))


def test_what_adapts_is_not_refused_and_says_how(axes):
    run = Run(look=FlexibleConfig(), lose=DropMoreConfig(), steer=PlainConfig())
    compat.check(run)
    assert compat.adapters(run) == ["look=flexible under lose=more: windows hold the tokens that stayed"]
    assert compat.adapters(Run(look=FlexibleConfig(), lose=KeepConfig(), steer=PlainConfig())) == []


def test_allowed_is_symmetric_and_inherited(axes):
    near, more, keep = axes["look"].get("near"), axes["lose"].get("more"), axes["lose"].get("keep")
    assert not compat.allowed(near, more)
    assert not compat.allowed(more, near)
    assert compat.allowed(near, keep)
    assert compat.allowed(near, axes["look"].get("near"))


def test_completed_replaces_what_does_not_go_with_the_pinned(axes):
    rest = {name: axis.get(axis.default) for name, axis in axes.items()}
    names = {axis: v.name for axis, v in compat.completed({"look": axes["look"].get("near")}, rest).items()}
    assert names == {"look": "near", "lose": "keep", "steer": "plain"}
    assert compat.completed({}, rest) == rest


@pytest.mark.parametrize("kind", ["needs", "takes", "adapts"])
def test_unknown_traits_are_an_error_at_declaration(kind):
    config = dataclass(kw_only=True, slots=True)(type("OddConfig", (), {kind: {"gird": "why"}, "__doc__": "Odd."}))
    axis = Axis("look", "", default="odd")
    with pytest.raises(ConfigError, match=rf"look=odd: {kind} 'gird', which is no trait; did you mean 'grid'\? \(traits: grid, "):
        axis.register("odd", config)(type("Odd", (), {}))
    assert not axis.variants
    blank = dataclass(kw_only=True, slots=True)(type("BlankConfig", (), {kind: {"grid": " "}, "__doc__": "Blank."}))
    with pytest.raises(ConfigError, match="without a reason"):
        axis.register("blank", blank)(type("Blank", (), {}))


def test_traits_are_the_words_that_configs_write():
    assert {t.value for t in Trait} == {
        "grid", "image_sequence", "text_sequence", "skips", "route", "free_decoder", "joint", "one_grid", "square",
    }  # fmt: skip
    assert "grid" in {Trait.GRID: 1}
    assert all(t.words and not t.words.endswith(".") for t in Trait)


def test_the_laboratory_s_defaults_go_together():
    discover()
    assert not list(compat.refusals(compat.chosen(compose([])).values()))
    assert set(compat.chosen(compose([]))) == set(AXES)
