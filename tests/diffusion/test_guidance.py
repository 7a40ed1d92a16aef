"""Guidance formulas on a small backbone whose velocity can be written down."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hdm.config.axes import GUIDANCE
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.diffusion.guidance import (
    Autoguidance,
    AutoguidanceConfig,
    Captions,
    Cfg,
    CfgConfig,
    CfgZeroStar,
    CfgZeroStarConfig,
    Interval,
    IntervalConfig,
    NoGuidance,
    NoGuidanceConfig,
    PathDrop,
    PathDropConfig,
    Routed,
    RoutedConfig,
    Weak,
)
from hdm.diffusion.passes import projection, stack
from hdm.diffusion.sampler import time_grid
from hdm.model import Architecture, build
from hdm.model.backbone import Backbone, Condition, Route, full_view


class Readable(Backbone):
    """v = t x + mean of the real text states, per channel, minus ten times the fraction of routed tokens. Records its calls."""

    def __init__(self):
        nn.Module.__init__(self)
        self.calls = []

    def forward(self, x, timestep, condition, *, route=None):
        self.calls.append((x.shape[0], route))
        mask = condition.text_mask
        weight = torch.ones(condition.text.shape[:2]) if mask is None else mask.float()
        text = (condition.text * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        rate = 0.0 if route is None else route.rate
        return timestep.view(-1, 1, 1, 1) * x + text[:, :, None, None] - 10 * rate


def conditions(lengths=(5, 2), batch=3, channels=4):
    g = torch.Generator().manual_seed(1)
    result = []
    for length in lengths:
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[0, -1] = length == 1
        result.append(
            Condition(
                text=torch.randn(batch, length, channels, generator=g),
                text_mask=mask,
                position=torch.randn(batch, 4, 2, generator=g),
                aspect=torch.randn(batch, generator=g),
            )
        )
    return result


X = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
T = torch.tensor([0.1, 0.5, 0.9])


def test_cfg_extrapolates_every_channel_in_one_forward():
    model, (condition, null) = Readable(), conditions()
    c, u = model(X, T, condition), model(X, T, null)
    model.calls.clear()
    guided = Cfg(CfgConfig(scale=3.0)).velocity(model, X, T, condition, null, route_noise=None)
    torch.testing.assert_close(guided, u + 3.0 * (c - u))
    assert model.calls == [(6, None)]
    assert bool(((guided - c).abs().amax(dim=(0, 2, 3)) > 0.01).all()), "some channel is not guided"


def test_scale_one_is_the_conditional_velocity_to_the_bit_for_one_pass():
    model, (condition, null) = Readable(), conditions()
    guided = Cfg(CfgConfig(scale=1.0)).velocity(model, X, T, condition, null, route_noise=None)
    assert model.calls == [(3, None)]
    assert torch.equal(guided, model(X, T, condition))
    assert torch.equal(NoGuidance(NoGuidanceConfig()).velocity(model, X, T, condition, null, route_noise=None), guided)


def test_scale_zero_ignores_the_caption():
    model, (condition, null) = Readable(), conditions()
    guided = Cfg(CfgConfig(scale=0.0)).velocity(model, X, T, condition, null, route_noise=None)
    torch.testing.assert_close(guided, model(X, T, null))


@pytest.mark.parametrize("lengths", [(5, 2), (1, 3), (2, 2)])
def test_stacking_pads_and_masks_the_shorter_text(lengths):
    first, second = conditions(lengths)
    both = stack(first, second)
    assert both.text.shape == (6, max(lengths), 4)
    assert both.text_mask.sum(1).tolist() == first.text_mask.sum(1).tolist() + second.text_mask.sum(1).tolist()
    assert torch.equal(both.text[3:, : lengths[1]], second.text)


def test_stacking_without_masks_needs_none_when_lengths_agree():
    first, second = conditions((3, 3))
    first.text_mask = second.text_mask = None
    assert stack(first, second).text_mask is None
    short = conditions((2, 2))[0]
    short.text_mask = None
    assert stack(first, short).text_mask.sum(1).tolist() == [3, 3, 3, 2, 2, 2]


def test_routed_guidance_moves_away_from_the_more_routed_unconditional_pass():
    model, (condition, null) = Readable(), conditions()
    noise = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    guided = Routed(RoutedConfig(scale=2.0, rate_cond=0.25, rate_uncond=0.5)).velocity(
        model, X, T, condition, null, route_noise=noise
    )
    (_, strong), (_, weak) = model.calls
    assert (strong.rate, weak.rate) == (0.25, 0.5)
    assert torch.equal(strong.noise, noise)
    assert torch.equal(weak.noise, noise)
    c, u = model(X, T, condition) - 2.5, model(X, T, null) - 5.0
    torch.testing.assert_close(guided, u + 2.0 * (c - u))


def test_routed_guidance_at_rate_zero_and_scale_one_is_the_plain_model():
    model, (condition, null) = Readable(), conditions()
    noise = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    guided = Routed(RoutedConfig(scale=1.0, rate_cond=0.0)).velocity(model, X, T, condition, null, route_noise=noise)
    assert model.calls == [(3, None)]
    assert torch.equal(guided, model(X, T, condition))


def test_routed_guidance_refuses_a_conditional_pass_that_is_the_weaker_one():
    with pytest.raises(ConfigError, match=r"guidance.rate_cond=0.5, guidance.rate_uncond=0.25: .* routed less"):
        compose(["guidance=routed", "guidance.rate_cond=0.5", "guidance.rate_uncond=0.25"])


def test_routed_guidance_refuses_a_model_without_routing():
    with pytest.raises(
        ConfigError,
        match=r"^guidance=routed: needs .*, which routing=none takes .*it routes nothing.; use routing=tread, or guidance=cfg$",
    ):
        compose(["guidance=routed", "routing=none"])


def guided(guidance, t=T, model=None):
    model, (condition, null) = model or Readable(), conditions()
    return guidance.velocity(model, X, t, condition, null, route_noise=torch.zeros(3, 4))


def both(t=T):
    model, (condition, null) = Readable(), conditions()
    return model(X, t, condition), model(X, t, null)


@pytest.mark.parametrize("name", GUIDANCE.names())
def test_at_scale_one_every_guidance_is_the_conditional_velocity_to_the_bit(name):
    config = GUIDANCE.get(name).config()
    if hasattr(config, "scale"):
        config.scale = 1.0
    assert torch.equal(guided(GUIDANCE.build(config)), both()[0])


def test_interval_guides_both_of_its_ends_and_nothing_beyond():
    t = torch.tensor([0.3, 0.7, 0.7 + 1e-6])
    c, u = both(t)
    result = guided(Interval(IntervalConfig(scale=2.0, low=0.3, high=0.7)), t)
    torch.testing.assert_close(result[:2], (u + 2 * (c - u))[:2])
    assert torch.equal(result[2], c[2])
    below = torch.tensor([0.3 - 1e-6, 0.0, 1.0])
    assert torch.equal(guided(Interval(IntervalConfig(scale=2.0, low=0.3, high=0.7)), below), both(below)[0])


def test_interval_pays_for_two_passes_only_inside():
    model, inside, outside = Readable(), torch.full((3,), 0.5), torch.full((3,), 0.8)
    interval = Interval(IntervalConfig(scale=2.0, high=0.7))
    guided(interval, inside, model)
    guided(interval, outside, model)
    assert [rows for rows, _ in model.calls] == [6, 3]


def test_the_whole_interval_is_cfg():
    whole = Interval(IntervalConfig(scale=3.0, low=0.0, high=1.0))
    for t in (torch.zeros(3), T, torch.ones(3)):
        assert torch.equal(guided(whole, t), guided(Cfg(CfgConfig(scale=3.0)), t))


def test_cfg_zero_star_in_float64():
    c, u = (v.double() for v in both())
    s = torch.stack([(c[i] * u[i]).sum() / (u[i] * u[i]).sum() for i in range(3)]).view(-1, 1, 1, 1)
    assert (s - s.mean()).abs().max() > 0.01, "one s for all would pass"
    result = guided(CfgZeroStar(CfgZeroStarConfig(scale=3.0)))
    torch.testing.assert_close(result.double(), s * u + 3.0 * (c - s * u), rtol=1e-5, atol=1e-5)


def test_cfg_zero_star_starts_with_no_velocity_and_no_pass():
    model, guidance = Readable(), CfgZeroStar(CfgZeroStarConfig(scale=3.0, zero=0.04))
    assert torch.equal(guided(guidance, torch.tensor([1.0, 0.97, 0.9601]), model), torch.zeros_like(X))
    assert model.calls == []
    edge = torch.tensor([0.96, 1.0, 0.5])  # the zeroed part is open at its lower end
    result = guided(guidance, edge)
    assert torch.equal(result[1], torch.zeros_like(X[1]))
    torch.testing.assert_close(result[[0, 2]], guided(CfgZeroStar(CfgZeroStarConfig(scale=3.0, zero=0.0)), edge)[[0, 2]])
    assert bool((result[[0, 2]].abs().amax(dim=(1, 2, 3)) > 0.1).all())


@pytest.mark.parametrize("steps", [25, 50, 100])
def test_on_a_uniform_grid_the_first_four_percent_of_the_steps_are_zero(steps):
    guidance = CfgZeroStar(CfgZeroStarConfig())
    zeroed = [bool((guided(guidance, torch.full((3,), 1 - k / steps)) == 0).all()) for k in range(steps)]
    assert sum(zeroed) == steps * 4 // 100
    assert all(zeroed[: sum(zeroed)])


def test_what_is_parallel_is_not_guided():
    """s u = c where c is a multiple of u: then any w returns c."""
    c, u = torch.tensor([3.0, -1.5]).view(-1, 1, 1, 1) * X[:2], X[:2]
    torch.testing.assert_close(projection(c, u), c)
    assert torch.equal(projection(c, torch.zeros_like(u)), torch.zeros_like(u))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guidance=interval", "guidance.low=0.8"], r"guidance\.low=0\.8, guidance\.high=0\.7: no interval of t"),
        (["guidance=interval", "guidance.high=1.5"], r"guidance\.high=1\.5: no interval of t"),
        (["guidance=interval", "guidance.low=-0.1"], r"guidance\.low=-0\.1"),
        (["guidance=cfg_zero_star", "guidance.zero=1"], r"guidance\.zero=1\.0: must be at least 0 and below 1"),
        (["guidance=cfg_zero_star", "guidance.zero=-0.1"], r"guidance\.zero=-0\.1"),
    ],
)
def test_impossible_intervals_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


ROUTE_NOISE = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("captions", list(Captions))
def test_treads_sampler(captions):
    """v2 + w (v1 - v2), v1 routed at 0.3 and v2 at 0.7, w 1.5; `neither` is the released code, where both drop the class."""
    model, (condition, null) = Readable(), conditions()
    config = RoutedConfig(scale=1.5, rate_cond=0.3, rate_uncond=0.7, captions=captions)
    result = Routed(config).velocity(model, X, T, condition, null, route_noise=ROUTE_NOISE)
    first, second = {
        Captions.strong: (condition, null), Captions.both: (condition, condition), Captions.neither: (null, null)
    }[captions]  # fmt: skip
    v1, v2 = (
        model(X, T, first, route=Route(noise=ROUTE_NOISE, rate=0.3)),
        model(X, T, second, route=Route(noise=ROUTE_NOISE, rate=0.7)),
    )
    torch.testing.assert_close(result, v2 + 1.5 * (v1 - v2))


def test_path_drop_moves_away_from_the_empty_caption_without_the_middle():
    model, (condition, null) = Readable(), conditions()
    result = PathDrop(PathDropConfig(scale=2.5)).velocity(model, X, T, condition, null, route_noise=ROUTE_NOISE)
    (_, strong), (_, weak) = model.calls
    assert strong is None
    assert weak.rate == 1.0
    c, u = model(X, T, condition), model(X, T, null) - 10
    torch.testing.assert_close(result, u + 2.5 * (c - u))
    with pytest.raises(
        ConfigError, match=r"^guidance=path_drop: needs .*, which routing=none takes .*; use routing=tread, or guidance="
    ):
        compose(["guidance=path_drop", "routing=none"])


class Halved(Readable):
    """Another network: half of the velocity of the first."""

    def forward(self, x, timestep, condition, *, route=None):
        return 0.5 * super().forward(x, timestep, condition, route=route)


def other_network():
    condition, null = conditions(lengths=(4, 3))
    return Weak(model=Halved(), condition=condition, null=null)


@pytest.mark.parametrize("captions", list(Captions))
def test_autoguidance_moves_away_from_the_other_network(captions):
    """EDM2: D0 + w (D1 - D0), D1 the network and D0 the other, both with the caption unless asked otherwise."""
    model, weak, (condition, null) = Readable(), other_network(), conditions()
    guidance = Autoguidance(AutoguidanceConfig(ckpt="x", scale=2.1, captions=captions))
    result = guidance.along(time_grid(4, 1.0), weak=weak).velocity(model, X, T, condition, null, route_noise=None)
    d1 = model(X, T, null if captions is Captions.neither else condition)
    d0 = weak.model(X, T, weak.condition if captions is Captions.both else weak.null)
    torch.testing.assert_close(result, d0 + 2.1 * (d1 - d0))
    with pytest.raises(ValueError, match="needs the weaker network"):
        guidance.velocity(model, X, T, condition, null, route_noise=None)


def test_autoguidance_at_scale_one_does_not_ask_the_other_network():
    model, weak, (condition, null) = Readable(), other_network(), conditions()
    guidance = Autoguidance(AutoguidanceConfig(ckpt="x", scale=1.0)).along(time_grid(4, 1.0), weak=weak)
    assert torch.equal(guidance.velocity(model, X, T, condition, null, route_noise=None), both()[0])
    assert weak.model.calls == []


def test_autoguidance_without_a_checkpoint_is_refused():
    with pytest.raises(ConfigError, match=r"guidance=autoguidance: guidance.ckpt is missing; name .* or use guidance=cfg"):
        compose(["guidance=autoguidance"])


@pytest.mark.parametrize(("steps", "zeroed"), [(1, 0), (3, 1), (20, 1), (25, 1), (26, 2), (100, 4)])
@pytest.mark.parametrize("time_shift", [0.2, 1.0, 3.0])
def test_cfg_zero_star_zeroes_four_percent_of_the_steps_of_any_grid(steps, zeroed, time_shift):
    times = time_grid(steps, time_shift)
    guidance = CfgZeroStar(CfgZeroStarConfig()).along(times)
    found = [bool((guided(guidance, torch.full((3,), t)) == 0).all()) for t in times[:-1].tolist()]
    assert found == [True] * zeroed + [False] * (steps - zeroed)
    nothing = CfgZeroStar(CfgZeroStarConfig(zero=0.0)).along(times)
    assert bool((guided(nothing, torch.ones(3)) != 0).any())


REAL = build(
    Architecture.of(
        compose(["model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1"])
    ),
    seed=0,
)
with torch.no_grad():
    for parameter in REAL.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
REAL.eval()
PLAIN_AT_ONE = ["none", "cfg", "interval", "cfg_zero_star", "routed", "path_drop", "autoguidance"]


def test_no_guidance_is_left_out_of_the_law():
    assert set(GUIDANCE.names()) == set(PLAIN_AT_ONE)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(PLAIN_AT_ONE), draw=st.integers(0, 2**32), batch=st.integers(1, 3), text=st.integers(1, 4))
def test_invariant_6_scale_one_is_the_conditional_pass_to_the_bit(name, draw, batch, text):
    """Spec 14 (6), with a real network, any state, time and caption (and CFG-Zero* behind its start)."""
    g = torch.Generator().manual_seed(draw)
    width, channels = REAL.architecture.context_dim, REAL.architecture.in_channels
    where = {"position": REAL.position_map(full_view(8, 8, batch), (2, 2)), "aspect": torch.randn(batch, generator=g)}
    condition = Condition(text=torch.randn(batch, text, width, generator=g), **where)
    null = Condition(text=torch.randn(batch, 1, width, generator=g), **where)
    x, t = 3 * torch.randn(batch, channels, 4, 4, generator=g), 0.9 * torch.rand(batch, generator=g)
    config = GUIDANCE.get(name).config()
    if name != "none":
        config.scale = 1.0
    guidance = GUIDANCE.build(config).along(time_grid(25, 1.0), weak=Weak(model=REAL, condition=null, null=null))
    noise = torch.rand(batch, 4, generator=g)
    with torch.no_grad():
        assert torch.equal(guidance.velocity(REAL, x, t, condition, null, route_noise=noise), REAL(x, t, condition))
        if name != "none":
            config.scale = 2.0  # the law can fail
            moved = GUIDANCE.build(config).along(time_grid(25, 1.0), weak=Weak(model=REAL, condition=null, null=null))
            if name != "interval" or bool((t <= 0.7).all()):
                assert not torch.equal(moved.velocity(REAL, x, t, condition, null, route_noise=noise), REAL(x, t, condition))
