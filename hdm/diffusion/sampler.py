"""Samplers integrate the probability-flow equation dx/dt = v(x, t) from noise at t=1 to an image at t=0 (spec 11).

Everything that they need is in the velocity: the image is x - t v, the noise x + (1 - t) v, and the score - (x + (1 - t) v) / t.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.config.axes import SAMPLER
from hdm.config.errors import ConfigError
from hdm.config.registry import option
from hdm.config.schema import Resolution
from hdm.diffusion.timestep import resolution_shift, shift

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): the state (B, C, H, W) and the timesteps (B,) to the velocity eps - x of the state's shape."""


Fresh = Callable[[int], Tensor]
"""fresh(k): standard normal noise of the state's shape for step k, always the same for equal k."""


class Sampler(ABC):
    """One way of integrating. Every row of the batch is integrated by itself."""

    times: Float[Tensor, " times"]
    """From 1 down to 0, float64."""

    evaluations: int
    """How often `sample` asks for the velocity."""

    def __init__(self, config: "StepsConfig") -> None:
        self.config = config
        self.times = self.grid(config.time_shift)

    def grid(self, time_shift: float) -> Float[Tensor, " times"]:
        """The times under a time shift."""
        return time_grid(self.config.steps, time_shift)

    def at(self, tokens: int) -> "Sampler":
        """This sampler on the grid for images of so many tokens."""
        c = self.config
        if c.resolution is Resolution.fixed:
            return self
        other = copy.copy(self)
        other.times = self.grid(c.time_shift * resolution_shift(c.resolution, tokens, base_tokens=c.base_tokens))
        return other

    @abstractmethod
    def sample(
        self, velocity: Velocity, noise: Float[Tensor, "B C H W"], *, fresh: Fresh | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The latents at t=0 on the path that begins at `noise` at t=1.

        The state keeps the precision of `noise`, whatever the velocity is computed in. Samplers of a stochastic equation draw
        from `fresh` and raise ValueError without it; the others ignore it.
        """


def time_grid(steps: int, time_shift: float) -> Float[Tensor, " times"]:
    """The steps + 1 times from 1 down to 0: a uniform grid moved by t' = a t / (1 + (a - 1) t).

    With a > 1 more of the steps lie near the noise, as large images need (SD3; spec 11).
    """
    return shift(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), time_shift)


def evaluate(velocity: Velocity, x: Float[Tensor, "B C H W"], t: float) -> Float[Tensor, "B C H W"]:
    """The velocity at time `t` for every row, in the precision of `x`."""
    return velocity(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)).to(x.dtype)


@dataclass(kw_only=True, slots=True)
class StepsConfig:
    """What every sampler has: a time grid."""

    steps: int = option(32, "steps")
    time_shift: float = option(1.0, "a of the time grid a t / (1 + (a - 1) t); 1 is uniform")
    resolution: Resolution = option(
        Resolution.fixed, "fixed: a is time_shift; sqrt: time_shift sqrt(tokens / base_tokens), as SD3; flux: time_shift e^mu"
    )
    base_tokens: int = option(256, "image tokens at which sqrt is 1")

    def check(self, run: Any) -> None:
        """Raise ConfigError for a grid that has no step or does not descend from 1 to 0."""
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: must be 1 or more")
        if not self.time_shift > 0:
            raise ConfigError(f"sampler.time_shift={self.time_shift}: must be above 0; 1 is the uniform grid")
        if self.base_tokens < 1:
            raise ConfigError(f"sampler.base_tokens={self.base_tokens}: must be 1 or more")


@dataclass(kw_only=True, slots=True)
class EulerConfig(StepsConfig):
    """Explicit Euler: x <- x - dt v(x, t), one evaluation per step.

    Report, "Inference"; the number of steps is that of the author's demo (spec 1.4).
    """

    steps: int = option(32, "evaluations of the velocity")


@SAMPLER.register("euler", EulerConfig)
class Euler(Sampler):
    """First order: halving the step halves the error."""

    def __init__(self, config: EulerConfig) -> None:
        super().__init__(config)
        self.evaluations = config.steps

    def sample(  # noqa: D102
        self, velocity: Velocity, noise: Float[Tensor, "B C H W"], *, fresh: Fresh | None = None
    ) -> Float[Tensor, "B C H W"]:
        x = noise
        for t, after in pairwise(self.times.tolist()):
            x = x - (t - after) * evaluate(velocity, x, t)
        return x


@dataclass(kw_only=True, slots=True)
class HeunConfig(StepsConfig):
    """Heun: x <- x - dt (v(x, t) + v(x', t')) / 2, where x' is Euler's step (Karras et al., 2022; spec 11).

    The last step is Euler's: Heun's would evaluate the velocity at t = 0, as REPA and EDM do not.
    """

    steps: int = option(32, "steps, of two evaluations each, the last of one")


@SAMPLER.register("heun", HeunConfig)
class Heun(Sampler):
    """Second order: halving the step quarters the error."""

    def __init__(self, config: HeunConfig) -> None:
        super().__init__(config)
        self.evaluations = 2 * config.steps - 1

    def sample(  # noqa: D102
        self, velocity: Velocity, noise: Float[Tensor, "B C H W"], *, fresh: Fresh | None = None
    ) -> Float[Tensor, "B C H W"]:
        x = noise
        for t, after in pairwise(self.times.tolist()):
            v = evaluate(velocity, x, t)
            if after > 0:
                v = (v + evaluate(velocity, x - (t - after) * v, after)) / 2
            x = x - (t - after) * v
        return x


@dataclass(kw_only=True, slots=True)
class Dpmpp2mConfig(StepsConfig):
    """DPM-Solver++(2M) on the flow: exponential integrator of the image x - t v, extrapolated from the step before.

    With alpha = 1 - t, sigma = t, lambda = log(alpha / sigma) and h the step of lambda: x <- (t'/t) x + (1 - t'/t) D, where
    D = x0 + h / (2 h_before) (x0 - x0_before) (Lu et al., 2022, algorithm 2; spec 11). The first step and the last, and where
    lambda is infinite, have D = x0. SANA: 20 steps, time_shift 3.
    """

    steps: int = option(20, "evaluations of the velocity")


@SAMPLER.register("dpmpp_2m", Dpmpp2mConfig)
class Dpmpp2m(Sampler):
    """Second order at one evaluation per step."""

    def __init__(self, config: Dpmpp2mConfig) -> None:
        super().__init__(config)
        self.evaluations = config.steps

    def sample(  # noqa: D102
        self, velocity: Velocity, noise: Float[Tensor, "B C H W"], *, fresh: Fresh | None = None
    ) -> Float[Tensor, "B C H W"]:
        x, before, h_before = noise, noise, math.inf
        for t, after in pairwise(self.times.tolist()):
            image = x - t * evaluate(velocity, x, t)
            h = _log_snr(after) - _log_snr(t)
            weight = h / (2 * h_before) if after > 0 and math.isfinite(h_before) else 0.0
            x = torch.lerp(image + weight * (image - before), x, after / t)
            before, h_before = image, h
        return x


def _log_snr(t: float) -> float:
    """log((1 - t) / t), infinite at the ends."""
    return math.inf if t == 0 else -math.inf if t == 1 else math.log((1 - t) / t)


@dataclass(kw_only=True, slots=True)
class EulerMaruyamaConfig(StepsConfig):
    """Euler-Maruyama on the reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW, w = 2 t, with the same law of every x_t (SiT, REPA).

    The score is - (x + (1 - t) v) / t. The last step, from t = `last` to 0, takes the drift and adds no noise (spec 11).
    """

    steps: int = option(250, "evaluations of the velocity")
    last: float = option(0.04, "t at which the last step begins")

    def check(self, run: Any) -> None:
        """Raise ConfigError for a grid that does not descend from 1 to 0."""
        StepsConfig.check(self, run)
        if not 0 < self.last < 1:
            raise ConfigError(f"sampler.last={self.last}: must lie between 0 and 1, where the last step begins; REPA has 0.04")


@SAMPLER.register("euler_maruyama", EulerMaruyamaConfig)
class EulerMaruyama(Sampler):
    """Weak order one; noise drawn anew at every step forgets the errors of the steps before."""

    def __init__(self, config: EulerMaruyamaConfig) -> None:
        self.last = config.last
        super().__init__(config)
        self.evaluations = config.steps

    def grid(self, time_shift: float) -> Float[Tensor, " times"]:
        """From 1 to `last`, then 0."""
        noisy = self.last + (1 - self.last) * time_grid(self.config.steps - 1, time_shift)
        return torch.cat([noisy, noisy.new_zeros(1)])

    def sample(  # noqa: D102
        self, velocity: Velocity, noise: Float[Tensor, "B C H W"], *, fresh: Fresh | None = None
    ) -> Float[Tensor, "B C H W"]:
        if fresh is None:
            raise ValueError("sampler=euler_maruyama draws noise at every step and needs `fresh`")
        x = noise
        for step, (t, after) in enumerate(pairwise(self.times.tolist())):
            v = evaluate(velocity, x, t)
            drift = v + (x + (1 - t) * v)  # w/2 score = - (x + (1 - t) v)
            x = x - (t - after) * drift
            if after > 0:
                x = x + math.sqrt(2 * t * (t - after)) * fresh(step).to(x)
        return x
