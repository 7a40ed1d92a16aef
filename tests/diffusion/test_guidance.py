"""Guidance formulas on a small backbone whose velocity can be written down."""

import pytest
import torch
from torch import nn

from hdm.config.axes import GUIDANCE
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.diffusion.guidance import (
    Cfg,
    CfgConfig,
    CfgZeroStar,
    CfgZeroStarConfig,
    Interval,
    IntervalConfig,
    NoGuidance,
    NoGuidanceConfig,
    Routed,
    RoutedConfig,
    projection,
    stack,
)
from hdm.model.backbone import Backbone, Condition


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
