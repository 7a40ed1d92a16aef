"""`match=`: sizes that make counts equal, against counts by hand and against networks that are really built."""

from dataclasses import dataclass

import pytest
from torch import nn

from hdm.config.axes import BACKBONE
from hdm.config.compose import compose, flatten, from_flat
from hdm.config.errors import ConfigError
from hdm.config.identity import run_name
from hdm.config.registry import option
from hdm.config.schema import Match
from hdm.model import Architecture, Backbone, build
from hdm.model.flops import count_flops
from hdm.model.match import matched
from hdm.sweep import parse

BASE = ["experiment=none"]
SMALL = ["experiment=none", "model=nano", "text_encoder=hash", "autoencoder=pixel", "crop.size=32", "model.patch=4"]
XUT_BASE = 343_163_920  # spec 0


@dataclass(kw_only=True, slots=True)
class StackConfig:
    """Blocks of one MLP each, an odd number of them."""

    blocks: int | None = option(None, "blocks; null: as many as XUT has")

    def check(self, run):
        from hdm.config.check import require

        require(self.blocks is None or self.blocks % 2 == 1, "backbone.blocks: must be odd")


class Stack(Backbone):
    def __init__(self, architecture):
        super().__init__()
        self.architecture, size = architecture, architecture.size
        blocks = architecture.backbone.blocks or 8
        self.enter = nn.Linear(architecture.in_channels * size.patch**2, size.dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size.dim, size.mlp_dim), nn.Linear(size.mlp_dim, size.dim)) for _ in range(blocks)
        )

    def forward(self, x, timestep, condition, *, route=None, tap=None):
        side = self.architecture.size.patch
        tokens = self.enter(nn.functional.unfold(x, side, stride=side).transpose(1, 2))
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


@pytest.fixture
def stack(monkeypatch):
    monkeypatch.setattr(BACKBONE, "variants", dict(BACKBONE.variants))
    BACKBONE.register("stack", StackConfig)(Stack)


def parameters(run):
    return sum(p.numel() for p in build(Architecture.of(run), seed=None).parameters())


def flops(run, *, tokens=16):
    return count_flops(Architecture.of(run), grid=(tokens, tokens), text_tokens=run.text_encoder.max_length)


def test_the_report_s_network_is_its_own_reference():
    run = matched(compose([*BASE, "match=params"]))
    assert run.model == compose(BASE).model
    assert run.match is Match.none
    assert f"{XUT_BASE:,}" in run.matched


@pytest.mark.parametrize("axis", ["merge=concat", "merge=none", "adaln=per_layer", "mlp=gelu", "adaln=hyper"])
def test_parameters_at_base_are_within_one_percent_of_the_report_s(axis):
    run = matched(compose([*BASE, axis, "match=params"]))
    assert parameters(run) == pytest.approx(XUT_BASE, rel=0.01)
    assert run.model.mlp_dim % 8 == 0


def test_the_mlp_of_concat_makes_up_for_its_cheaper_merge():
    """By hand: a block has 3 d m weights and 2 m + d biases in its MLP; concat lacks 4 merges, 4 gains and one modulation MLP."""
    d, m = 1024, 3072
    cross, concat = 4 * d * d + d, 2 * d * d + d
    modulation = 2 * d + (4 * d * d + 4 * d) + (12 * d * d + 3 * d)
    missing = 4 * (cross + d - concat) + modulation
    units = missing / (20 * 8 * (3 * d + 2))
    run = matched(compose([*BASE, "merge=concat", "match=params"]))
    assert run.model.mlp_dim == m + 8 * round(units)
    assert abs(parameters(run) - XUT_BASE) <= 20 * 8 * (3 * d + 2) / 2


def test_flops_are_those_of_the_unrouted_pass():
    run = matched(compose([*SMALL, "merge=none", "match=flops"]))
    xut = compose(SMALL)
    assert flops(run, tokens=8) == pytest.approx(flops(xut, tokens=8), rel=0.01)
    assert flops(compose([*SMALL, "merge=none"]), tokens=8) < 0.97 * flops(xut, tokens=8)
    assert run.model == matched(compose([*SMALL, "merge=none", "match=flops", "routing=none"])).model


def test_multiples_of_one_where_eight_are_too_coarse():
    narrow = [*SMALL, "model.dim=16", "model.head_dim=8", "model.mlp_dim=16", "merge=none"]
    run = matched(compose([*narrow, "match=params"]))
    assert parameters(run) == pytest.approx(parameters(compose(narrow[:-1])), rel=0.01)


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_blocks_come_first_and_their_checks_are_kept(stack, kind):
    run = matched(compose([*SMALL, "backbone=stack", f"match={kind}"]))
    target, count = compose(SMALL), {"params": parameters, "flops": lambda r: flops(r, tokens=8)}[kind]
    assert run.backbone.blocks % 2 == 1
    assert count(run) == pytest.approx(count(target), rel=0.01)
    neighbours = [
        compose([*SMALL, "backbone=stack", f"backbone.blocks={n}"]) for n in (run.backbone.blocks - 2, run.backbone.blocks + 2)
    ]
    own = compose([*SMALL, "backbone=stack", f"backbone.blocks={run.backbone.blocks}"])
    assert all(abs(count(own) - count(target)) <= abs(count(other) - count(target)) for other in neighbours)


def test_blocks_that_are_given_stay(stack):
    run = matched(compose([*SMALL, "backbone=stack", "backbone.blocks=3", "match=params"]))
    assert run.backbone.blocks == 3
    assert parameters(run) == pytest.approx(parameters(compose(SMALL)), rel=0.01)


def test_what_cannot_be_matched_says_how_near_it_comes():
    with pytest.raises(
        ConfigError,
        match=r"match=params: backbone=xut cannot come within 1 % of the [\d,]+ parameters of XUT; the nearest has [\d,]+ \(\+",
    ) as caught:
        matched(compose([*SMALL, "adaln=hyper", "adaln.layers=60", "match=params"]))
    assert "\n" not in str(caught.value)


def test_matching_is_done_once_and_the_run_is_the_one_of_those_sizes():
    run = matched(compose([*SMALL, "merge=concat", "match=params"]))
    assert matched(run) is run
    assert from_flat(flatten(run)) == run
    same = compose([*SMALL, "merge=concat", f"model.mlp_dim={run.model.mlp_dim}"])
    assert run_name(run) == run_name(same)
    assert run_name(run) != run_name(compose([*SMALL, "merge=concat"]))


def test_arms_of_a_sweep_are_matched_each():
    arms = parse([*SMALL, "merge=cross,concat", "match=none,params"]).arms
    assert [arm.label for arm in arms] == ["merge=cross match=none", "merge=concat match=none", "merge=concat match=params"]
    counts = [parameters(arm.run) for arm in arms]
    assert counts[2] == pytest.approx(counts[0], rel=0.01)
    assert counts[1] < 0.97 * counts[0]
    assert len({arm.folder for arm in arms}) == 3
