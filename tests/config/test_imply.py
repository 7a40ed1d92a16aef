"""What a backbone's published form implies for other axes, and what overrules it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hdm.config.axes import BACKBONE, discover
from hdm.config.compose import compose, experiment_lines, flatten, from_flat
from hdm.config.errors import ConfigError
from hdm.config.identity import identity, run_name
from hdm.config.registry import option
from hdm.sweep import parse

discover()


@dataclass(kw_only=True, slots=True)
class BoxConfig:
    """A backbone without a U."""

    implies: ClassVar[dict[str, str]] = {
        "merge": "none",
        "adaln": "per_layer",
        "adaln.gate": "zero",
        "routing": "none",
        "model.patch": "4",
    }
    blocks: int | None = option(None, "blocks")


@pytest.fixture(autouse=True)
def box(monkeypatch):
    monkeypatch.setattr(BACKBONE, "variants", dict(BACKBONE.variants))
    BACKBONE.register("box", BoxConfig)(type("Box", (), {}))


def chosen(*overrides, **kwargs):
    flat = flatten(compose(overrides, **kwargs))
    return {key: flat.get(key) for key in ("merge", "adaln", "adaln.gate", "routing", "model.patch")}


PUBLISHED = {"merge": "none", "adaln": "per_layer", "adaln.gate": "zero", "routing": "none", "model.patch": 4}


def write(folder, name, text):
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments" / f"{name}.yaml").write_text(text)


def test_a_backbone_brings_its_published_form():
    assert chosen("backbone=box") == PUBLISHED
    assert chosen("backbone=xut") == chosen()


@pytest.mark.parametrize("order", [1, -1])
def test_an_explicit_line_wins_whatever_its_place(order):
    def say(*lines):
        return chosen(*lines[::order])

    assert say("backbone=box", "merge=add") == PUBLISHED | {"merge": "add"}
    assert say("backbone=box", "adaln.gate=none") == PUBLISHED | {"adaln.gate": "none"}
    assert say("backbone=box", "adaln=per_layer") == PUBLISHED
    assert say("backbone=box", "adaln=single") == PUBLISHED | {"adaln": "single", "adaln.gate": "one_plus"}
    assert say("backbone=box", "model=tiny") == PUBLISHED
    assert say("backbone=box", "model.patch=1") == PUBLISHED | {"model.patch": 1}


def test_it_stands_above_earlier_sources_and_below_later_ones(tmp_path):
    write(tmp_path, "first", "merge: add\nadaln: single\nmodel.patch: 1\n")
    write(tmp_path, "rated", "base: first\nrouting.rate: 0.25\n")
    assert chosen("experiment=rated", "backbone=box") == PUBLISHED
    assert chosen("experiment=first", "backbone=box") == PUBLISHED
    assert chosen("backbone=box", "experiment=first") == PUBLISHED | {
        "merge": "add",
        "adaln": "single",
        "adaln.gate": "one_plus",
        "model.patch": 1,
    }
    write(tmp_path, "boxed", "base: first\nbackbone: box\nadaln.gate: none\n")
    assert chosen("experiment=boxed") == PUBLISHED | {"adaln.gate": "none"}
    assert chosen("experiment=boxed", "merge=lerp")["merge"] == "lerp"
    assert chosen("experiment=boxed", "adaln=single") == PUBLISHED | {"adaln": "single", "adaln.gate": "one_plus"}


def test_another_backbone_takes_the_implied_lines_away_and_repeating_one_implies_nothing_new(tmp_path):
    write(tmp_path, "boxed", "backbone: box\nmerge: add\n")
    assert chosen("experiment=boxed", "backbone=xut") == chosen() | {"merge": "add"}
    assert chosen("experiment=boxed", "backbone=box") == PUBLISHED | {"merge": "add"}


def test_a_stored_run_is_read_back_as_it_was():
    run = compose(["backbone=box", "merge=none", "adaln=single"])
    assert from_flat(flatten(run)) == run
    assert flatten(from_flat(flatten(compose([])), ["backbone=box"]))["merge"] == "none"


def test_the_digest_is_that_of_the_configuration_however_it_was_said():
    short, long = compose(["backbone=box"]), compose(["backbone=box", *(f"{k}={v}" for k, v in PUBLISHED.items())])
    assert identity(flatten(short)) == identity(flatten(long))
    assert run_name(short).startswith("run-s0-")


def test_each_arm_of_a_sweep_composes_alone():
    sweep = parse(["experiment=none", "backbone=xut,box", "seeds=2"])
    assert [arm.label for arm in sweep.arms][::2] == ["backbone=xut seed=0", "backbone=box seed=0"]
    assert [flatten(arm.run)["merge"] for arm in sweep.arms] == ["cross", "cross", "none", "none"]


def test_a_field_that_is_set_once_holds_for_the_arms_whose_variant_has_it():
    arms = parse(["experiment=none", "backbone=xut,box", "routing.rate=0.25"]).arms
    assert [getattr(arm.run.routing, "rate", None) for arm in arms] == [0.25, None]
    arms = parse(["experiment=none", "backbone=xut,box", "routing=tread", "routing.rate=0.25"]).arms
    assert [getattr(arm.run.routing, "rate", None) for arm in arms] == [0.25, 0.25]
    with pytest.raises(ConfigError, match=r"routing=none has no field 'rate'; it is a field of routing=tread"):
        compose(["backbone=box", "routing.rate=0.25"])


def test_errors_name_where_an_implied_line_comes_from(monkeypatch):
    monkeypatch.setattr(BoxConfig, "implies", {"merge": "nnoe"})
    with pytest.raises(ConfigError, match=r"merge=nnoe \(implied by backbone=box\): no such variant; did you mean 'none'"):
        compose(["backbone=box"])


def test_what_an_experiment_sets_is_told_with_or_without_what_it_implies(tmp_path):
    write(tmp_path, "boxed", "backbone: box\nseed: 1\n")
    assert experiment_lines("boxed") == {"experiment": "boxed", "backbone": "box", "seed": "1"}
    assert experiment_lines("boxed", implied=True)["adaln.gate"] == "zero"
