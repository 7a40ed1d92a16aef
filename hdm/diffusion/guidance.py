"""Guidance steers a sampled velocity away from what a weaker prediction would say: v = weak + w (strong - weak) (spec 11).

What makes the weak prediction weak is the variant: no caption (cfg), fewer tokens (routed), fewer blocks (path_drop), another
network (autoguidance). Every channel is guided. At w=1 the strong prediction is returned as it is; the weak one is not computed.
"""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.config.axes import GUIDANCE
from hdm.config.check import require
from hdm.config.errors import ConfigError
from hdm.config.registry import option
from hdm.config.schema import Weights
from hdm.diffusion.passes import both_passes, extrapolate, projection
from hdm.model.backbone import Backbone, Condition, Route


class Captions(Enum):
    """Which of the two passes see the caption; the others see the empty one."""

    strong = "strong"
    both = "both"
    neither = "neither"


@dataclass(kw_only=True, slots=True)
class Weak:
    """Another, weaker network that predicts velocities, with the conditions as it takes them."""

    model: Backbone
    condition: Condition
    null: Condition


class Guidance(ABC):
    """One way of turning a backbone into the velocity that a sampler follows."""

    def along(self, times: Float[Tensor, " times"], *, weak: Weak | None = None) -> "Guidance":
        """This guidance for one batch that is sampled at `times`, from 1 down to 0, with the other network where there is one."""
        return self

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


def seen(captions: Captions, condition: Condition, null: Condition) -> tuple[Condition, Condition]:
    """What the strong and the weak pass are given."""
    return null if captions is Captions.neither else condition, condition if captions is Captions.both else null


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

    s projects c onto u, so guidance only pushes across u. The paper zeroes the first 4 % of the steps. So does this, whatever the
    sampler's grid: 4 % of the steps of a shifted grid are another part of the time.
    """

    scale: float = option(3.0, "w: 1 is no guidance")
    zero: float = option(0.04, "fraction of the steps, rounded up, that begin with velocity 0; 0 zeroes nothing")

    def check(self, run: Any) -> None:
        """Raise ConfigError for a start that is no part of the time."""
        require(0 <= self.zero < 1, f"guidance.zero={self.zero}: must be at least 0 and below 1; the paper has 0.04")


@GUIDANCE.register("cfg_zero_star", CfgZeroStarConfig)
class CfgZeroStar(Guidance):
    """Both passes in one batch; none while the velocity is zero."""

    def __init__(self, config: CfgZeroStarConfig) -> None:
        self.config = config
        self.begin = 1 - config.zero

    def along(self, times: Float[Tensor, " times"], *, weak: Weak | None = None) -> "CfgZeroStar":
        """Zero while t is nearer to the zeroed steps than to the first one that is not; on a uniform grid, for t > 1 - zero."""
        steps = len(times) - 1
        zeroed = min(math.ceil(steps * self.config.zero - 1e-9), steps - 1)
        other = copy.copy(self)
        other.begin = float(times[zeroed - 1] + times[zeroed]) / 2 if zeroed > 0 else 1.0
        return other

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del route_noise  # both passes see all tokens
        c = self.config
        start = t > self.begin
        if start.all():
            return torch.zeros_like(x)
        if c.scale == 1.0:
            guided: Tensor = model(x, t, condition)
        else:
            conditional, unconditional = both_passes(model, x, t, condition, null)
            guided = extrapolate(conditional, projection(conditional, unconditional), c.scale)
        return guided.masked_fill(start.view(-1, 1, 1, 1), 0.0)


@dataclass(kw_only=True, slots=True)
class RoutedConfig:
    """TREAD auto-guidance: the weak pass sees the empty caption and, mid-network, fewer image tokens (spec 1.3 h, 4).

    It needs a backbone that was trained with routing. The defaults are the report's. TREAD's own sampler has scale 1.5, rates 0.3
    and 0.7, and drops the class in both passes as released (captions=neither, blind to the prompt even at w=1); captions=both is
    guidance by routing alone.
    """

    needs: ClassVar[dict[str, str]] = {"route": "its weak pass takes image tokens past the middle of the network"}

    scale: float = option(3.0, "w: 1 is the conditional pass alone")
    rate_cond: float = option(0.0, "fraction of image tokens that bypass in the conditional pass; 0 does not route")
    rate_uncond: float = option(0.5, "the same in the weak pass; must be the larger one")
    captions: Captions = option(Captions.strong, "passes that see the caption: strong, both or neither")

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
        first, second = seen(c.captions, condition, null)
        strong: Tensor = model(x, t, first, route=Route(noise=route_noise, rate=c.rate_cond) if c.rate_cond else None)
        if c.scale == 1.0:
            return strong
        weak = model(x, t, second, route=Route(noise=route_noise, rate=c.rate_uncond))
        return extrapolate(strong.float(), weak.float(), c.scale)


@dataclass(kw_only=True, slots=True)
class PathDropConfig:
    """Path-drop guidance: the weak pass sees the empty caption and skips the routed middle of the network (SPRINT, 2025; spec 4).

    It needs a network that was trained with routing, and costs less than two passes.
    """

    needs: ClassVar[dict[str, str]] = {"route": "its weak pass skips the middle of the network"}

    scale: float = option(3.0, "w: 1 is the conditional pass alone")


@GUIDANCE.register("path_drop", PathDropConfig)
class PathDrop(Guidance):
    """Two passes; the weak one is routed at rate 1."""

    def __init__(self, config: PathDropConfig) -> None:
        self.scale = config.scale

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        if route_noise is None:
            raise ValueError("path-drop guidance needs route_noise")
        strong: Tensor = model(x, t, condition)
        if self.scale == 1.0:
            return strong
        weak = model(x, t, null, route=Route(noise=route_noise, rate=1.0))
        return extrapolate(strong.float(), weak.float(), self.scale)


@dataclass(kw_only=True, slots=True)
class AutoguidanceConfig:
    """Autoguidance: the weak pass is another network, smaller or less trained, of the same caption (Karras et al., 2024; spec 11).

    EDM2-S: w 2.1 against XS after 1/16 of the training; XXL 2.05. The other network sees the same latents and text states; its
    width, backbone, objective and patch are its own. captions=strong with one that has only seen empty captions is EDM2's CFG.
    """

    ckpt: str | None = option(None, "run folder or checkpoint of the weaker network: a narrower run, or an earlier checkpoint")
    weights: Weights = option(Weights.ema, "its weights: ema, raw or ema_decay")
    scale: float = option(2.1, "w: 1 is no guidance")
    captions: Captions = option(Captions.both, "passes that see the caption: both, strong or neither")

    def check(self, run: Any) -> None:
        """Raise ConfigError without another network."""
        require(
            bool(self.ckpt),
            "guidance=autoguidance: guidance.ckpt is missing; name the run folder or checkpoint of a weaker network, or use"
            " guidance=cfg",
        )


@GUIDANCE.register("autoguidance", AutoguidanceConfig)
class Autoguidance(Guidance):
    """One pass of each network; `along` is told the other one."""

    weak: Weak | None = None

    def __init__(self, config: AutoguidanceConfig) -> None:
        self.config = config

    def along(self, times: Float[Tensor, " times"], *, weak: Weak | None = None) -> "Autoguidance":
        """With the other network."""
        other = copy.copy(self)
        other.weak = weak
        return other

    def velocity(  # noqa: D102
        self, model: Backbone, x: Tensor, t: Tensor, condition: Condition, null: Condition, *, route_noise: Tensor | None
    ) -> Tensor:
        del route_noise  # both networks see all tokens
        c = self.config
        strong: Tensor = model(x, t, seen(c.captions, condition, null)[0])
        if c.scale == 1.0:
            return strong
        if self.weak is None:
            raise ValueError("guidance=autoguidance needs the weaker network; give it to `along`")
        weak = self.weak.model(x, t, seen(c.captions, self.weak.condition, self.weak.null)[1])
        return extrapolate(strong.float(), weak.float(), c.scale)
