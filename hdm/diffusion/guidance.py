"""Guidance steers a sampled velocity away from what a weaker prediction would say: v = weak + w (strong - weak) (spec 11).

Every channel is guided. At w=1 the strong prediction is returned as it is, and the weak one is not computed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.config.axes import GUIDANCE
from hdm.config.check import require
from hdm.config.errors import ConfigError
from hdm.config.registry import option
from hdm.model.backbone import Backbone, Condition, Route


class Guidance(ABC):
    """One way of turning a backbone into the velocity that a sampler follows."""

    @abstractmethod
    def velocity(
        self,
        model: Backbone,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        condition: Condition,
        null: Condition,
        *,
        route_noise: Float[Tensor, "B N"] | None,
    ) -> Float[Tensor, "B C H W"]:
        """The guided velocity.

        `null` is `condition` with the empty caption. `route_noise` orders the image tokens for passes that are routed; it stays the
        same along a trajectory, so that the same tokens are left out at every step.
        """


def extrapolate(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale (strong - weak)."""
    return torch.lerp(weak, strong, scale)


def both_passes(
    model: Backbone, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], condition: Condition, null: Condition
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """The velocities under `condition` and under `null`, float32, from one forward pass."""
    both = model(torch.cat([x, x]), torch.cat([t, t]), stack(condition, null))
    conditional, unconditional = both.float().chunk(2)
    return conditional, unconditional


def stack(first: Condition, second: Condition) -> Condition:
    """Both conditions as one batch; the shorter text is padded and masked."""
    length = max(first.text.shape[1], second.text.shape[1])
    texts, masks = zip(*(_padded(c, length) for c in (first, second)))
    unmasked = first.text_mask is None and second.text_mask is None and first.text.shape[1] == second.text.shape[1]
    return Condition(
        text=torch.cat(texts),
        text_mask=None if unmasked else torch.cat(masks),
        position=torch.cat([first.position, second.position]),
        aspect=torch.cat([first.aspect, second.aspect]),
    )


def _padded(condition: Condition, length: int) -> tuple[Tensor, Tensor]:
    text, mask = condition.text, condition.text_mask
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    missing = length - text.shape[1]
    return torch.nn.functional.pad(text, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


@dataclass(kw_only=True, slots=True)
class NoGuidanceConfig:
    """The conditional velocity as it is."""


@GUIDANCE.register("none", NoGuidanceConfig)
class NoGuidance(Guidance):
    """One pass."""

    def __init__(self, config: NoGuidanceConfig) -> None:
        pass

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del null, route_noise  # one pass, all tokens
        velocity: Tensor = model(x, t, condition)
        return velocity


@dataclass(kw_only=True, slots=True)
class CfgConfig:
    """Classifier-free guidance: u + w (c - u), where u sees the empty caption (Ho and Salimans, 2022).

    It needs a model that has seen empty captions: captions.text_dropout above 0.
    """

    scale: float = option(3.0, "w: 1 is no guidance, 0 ignores the caption")


@GUIDANCE.register("cfg", CfgConfig)
class Cfg(Guidance):
    """Both passes in one batch; at w=1 only the conditional one."""

    def __init__(self, config: CfgConfig) -> None:
        self.scale = config.scale

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del route_noise  # both passes see all tokens
        if self.scale == 1.0:
            velocity: Tensor = model(x, t, condition)
            return velocity
        return extrapolate(*both_passes(model, x, t, condition, null), self.scale)


@dataclass(kw_only=True, slots=True)
class IntervalConfig:
    """Classifier-free guidance for low <= t <= high only, the conditional velocity elsewhere (Kynkäänniemi et al., 2024; spec 11).

    REPA: 1.8 up to t = 0.7; REPA-E: 2.5 up to 0.75. Each evaluation of the velocity is judged by its own t. Outside the
    interval a step costs one pass.
    """

    scale: float = option(1.8, "w inside the interval: 1 is no guidance")
    low: float = option(0.0, "smallest guided t, 0 being the image")
    high: float = option(0.7, "largest guided t, 1 being noise")

    def check(self, run: Any) -> None:
        """Raise ConfigError for an interval that is none."""
        require(
            0 <= self.low < self.high <= 1,
            f"guidance.low={self.low}, guidance.high={self.high}: no interval of t; choose 0 <= low < high <= 1",
        )


@GUIDANCE.register("interval", IntervalConfig)
class Interval(Guidance):
    """Both passes in one batch, where any row needs them."""

    def __init__(self, config: IntervalConfig) -> None:
        self.config = config

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del route_noise  # both passes see all tokens
        c = self.config
        inside = (t >= c.low) & (t <= c.high)
        if c.scale == 1.0 or not inside.any():
            velocity: Tensor = model(x, t, condition)
            return velocity
        conditional, unconditional = both_passes(model, x, t, condition, null)
        return torch.where(inside.view(-1, 1, 1, 1), extrapolate(conditional, unconditional, c.scale), conditional)


@dataclass(kw_only=True, slots=True)
class CfgZeroStarConfig:
    """CFG-Zero*: s u + w (c - s u) with s = <c, u> / |u|^2 of each sample, and velocity 0 at the start (Fan et al., 2025; spec 11).

    s projects c onto u, so guidance only pushes across u. The paper zeroes the first 4 % of the steps; here it is the first
    `zero` of the time, which on a uniform grid are the same steps.
    """

    scale: float = option(3.0, "w: 1 is no guidance")
    zero: float = option(0.04, "the velocity is 0 for t > 1 - zero; 0 zeroes nothing")

    def check(self, run: Any) -> None:
        """Raise ConfigError for a start that is no part of the time."""
        require(0 <= self.zero < 1, f"guidance.zero={self.zero}: must be at least 0 and below 1; the paper has 0.04")


@GUIDANCE.register("cfg_zero_star", CfgZeroStarConfig)
class CfgZeroStar(Guidance):
    """Both passes in one batch; none while the velocity is zero."""

    def __init__(self, config: CfgZeroStarConfig) -> None:
        self.config = config

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del route_noise  # both passes see all tokens
        c = self.config
        start = t > 1 - c.zero
        if start.all():
            return torch.zeros_like(x)
        if c.scale == 1.0:
            guided: Tensor = model(x, t, condition)
        else:
            conditional, unconditional = both_passes(model, x, t, condition, null)
            guided = extrapolate(conditional, projection(conditional, unconditional), c.scale)
        return guided.masked_fill(start.view(-1, 1, 1, 1), 0.0)


def projection(v: Float[Tensor, "B C H W"], onto: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """<v, onto> / |onto|^2 onto, sample by sample; 0 onto 0."""
    dot, square = (v * onto).sum((1, 2, 3), keepdim=True), onto.square().sum((1, 2, 3), keepdim=True)
    return dot / square.clamp_min(torch.finfo(square.dtype).tiny) * onto


@dataclass(kw_only=True, slots=True)
class RoutedConfig:
    """TREAD auto-guidance: the weak pass sees the empty caption and, mid-network, fewer image tokens (spec 1.3 h, 4).

    It needs a backbone that was trained with routing.
    """

    needs: ClassVar[dict[str, str]] = {"route": "its weak pass leaves image tokens out"}

    scale: float = option(3.0, "w: 1 is the conditional pass alone")
    rate_cond: float = option(0.0, "fraction of image tokens that bypass in the conditional pass; 0 does not route")
    rate_uncond: float = option(0.5, "the same in the weak pass; must be the larger one")

    def check(self, run: Any) -> None:
        """Raise ConfigError unless the weak pass is the weaker one."""
        if not 0 <= self.rate_cond < self.rate_uncond < 1:
            raise ConfigError(
                f"guidance.rate_cond={self.rate_cond}, guidance.rate_uncond={self.rate_uncond}: the conditional pass"
                " must be routed less than the weak one; choose 0 <= rate_cond < rate_uncond < 1"
            )


@GUIDANCE.register("routed", RoutedConfig)
class Routed(Guidance):
    """Two passes, since they differ in the number of tokens."""

    def __init__(self, config: RoutedConfig) -> None:
        self.config = config

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        c = self.config
        if route_noise is None:
            raise ValueError("routed guidance needs route_noise")
        strong: Tensor = model(x, t, condition, route=Route(noise=route_noise, rate=c.rate_cond) if c.rate_cond else None)
        if c.scale == 1.0:
            return strong
        weak = model(x, t, null, route=Route(noise=route_noise, rate=c.rate_uncond))
        return extrapolate(strong.float(), weak.float(), c.scale)
