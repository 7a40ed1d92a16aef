"""The law of the training timestep t in [0, 1], given by its inverse distribution function.

Training maps one uniform draw per sample (`quantiles`) through `from_uniform`; validation maps fixed quantiles through the report's
law. Samplers shift their grids by the same `shift` and `resolution_shift`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hdm import rng
from hdm.config.axes import TIMESTEP
from hdm.config.check import require
from hdm.config.registry import option
from hdm.config.schema import Resolution, RunConfig


@dataclass(kw_only=True, slots=True)
class TimestepConfig:
    """What every law has: how its quantiles are drawn."""

    stratified: bool = option(False, "one draw in each of train.batch_size equal parts of the law, in every global batch (minRF)")


class Timestep:
    """A law of t."""

    def __init__(self, config: TimestepConfig) -> None:
        self.config = config

    def quantiles(self, seed: int, index: Sequence[int], *, batch_size: int) -> NDArray[np.float32]:
        """The uniform draw u in [0, 1) of each sample, by its number in the run; `batch_size` is the global one."""
        return stratified(seed, index, batch_size) if self.config.stratified else rng.uniform(seed, "timestep", index)

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t, float32; u in [0, 1). Exact in the tails: computed in float64.

        `tokens` is the number of image tokens, for laws that follow the resolution.
        """
        raise NotImplementedError


def shift(t: Float[Tensor, "..."], a: float) -> Float[Tensor, "..."]:
    """Time shift t' = a t / (1 + (a - 1) t): noisier for a > 1, with 0 and 1 fixed; it adds log(a) to logit(t) (SD3; spec 11)."""
    return (a * t / (1.0 + (a - 1.0) * t)).clamp(max=1.0)  # rounding takes 1 beyond itself for some a


def resolution_shift(rule: Resolution, tokens: int, *, base_tokens: int) -> float:
    """The a of `shift` for images of so many tokens: sqrt(tokens / base_tokens), as SD3, or e^mu, as Flux (spec 11).

    Flux's mu is linear in the tokens, 0.5 at 256 and 1.15 at 4096 of them, and knows no base.
    """
    match rule:
        case Resolution.fixed:
            return 1.0
        case Resolution.sqrt:
            return math.sqrt(tokens / base_tokens)
        case Resolution.flux:
            return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def stratified(seed: int, index: Sequence[int], strata: int) -> NDArray[np.float32]:
    """Uniform draws of which `strata` consecutive ones, from a multiple of `strata` on, fall into as many equal parts of [0, 1).

    Which part is whose is drawn anew for every such group, so that neighbours, which share a micro-batch, lie anywhere. Each
    draw is uniform by itself, and a function of (seed, its number, strata): micro-batches and resuming change none.
    """
    parts = {group: rng.generator(seed, "timestep/strata", group).permutation(strata) for group in {i // strata for i in index}}
    part = np.array([parts[i // strata][i % strata] for i in index], dtype=np.float64)
    draws = ((part + rng.uniform(seed, "timestep", index)) / strata).astype(np.float32)
    return np.minimum(draws, np.nextafter(np.float32(1), np.float32(0)))  # float32 rounds the last draws of the last part to 1


def logit_normal(u: Float[Tensor, " B"], mean: float, std: float) -> Float[Tensor, " B"]:
    """The u-quantile of sigmoid(mean + std z), z standard normal, float64."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


@dataclass(kw_only=True, slots=True)
class LogitNormalConfig(TimestepConfig):
    """t = sigmoid(mean + std z), z standard normal (spec 11; SD3 and the report with mean 0, std 1).

    REPA's log-normal sigma, t = sigma / (1 + sigma) with log sigma standard normal, is this law too. JiT: mean 0.8, std 0.8.
    """

    mean: float = option(0.0, "mean of logit(t); above 0 trains noisier images")
    std: float = option(1.0, "standard deviation of logit(t)")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a law that is none."""
        require(self.std > 0, f"timestep.std={self.std}: must be above 0")


@TIMESTEP.register("logit_normal", LogitNormalConfig)
class LogitNormal(Timestep):
    """Inverse CDF: sigmoid(mean + std Phi^-1(u))."""

    def __init__(self, config: LogitNormalConfig) -> None:
        super().__init__(config)
        self.mean, self.std = config.mean, config.std

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t."""
        return logit_normal(u, self.mean, self.std).float()


@dataclass(kw_only=True, slots=True)
class UniformConfig(TimestepConfig):
    """t uniform on [0, 1]."""


@TIMESTEP.register("uniform", UniformConfig)
class Uniform(Timestep):
    """Inverse CDF: the identity."""

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t."""
        return u.float()


@dataclass(kw_only=True, slots=True)
class EdmConfig(TimestepConfig):
    """t = sigma / (sigma + sigma_data) with log sigma normal (Karras et al., 2022): logit_normal in EDM's parameters.

    x + sigma eps is x_t / (1 - t) where sigma = t / (1 - t), so logit(t) = log(sigma) for data of standard deviation 1. Published
    P_mean, P_std: EDM -1.2, 1.2; EDM2 -0.4, 1.0; MicroDiT -0.6, 1.2, then 0, 0.6 at 512 px (spec 11). EDM's and EDM2's data have
    a standard deviation of 0.5: sigma_data=0.5 gives their signal-to-noise ratios to data of 1, sigma_data=1 their sigmas.
    """

    p_mean: float = option(-1.2, "P_mean, the mean of log sigma")
    p_std: float = option(1.2, "P_std, the standard deviation of log sigma")
    sigma_data: float = option(1.0, "standard deviation of the data for which P_mean is stated, relative to the data here")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a law that is none."""
        require(self.p_std > 0, f"timestep.p_std={self.p_std}: must be above 0")
        require(self.sigma_data > 0, f"timestep.sigma_data={self.sigma_data}: must be above 0; 1 takes sigma as it is")


@TIMESTEP.register("edm", EdmConfig)
class Edm(Timestep):
    """Inverse CDF: sigma / (sigma + sigma_data), sigma = exp(P_mean + P_std Phi^-1(u))."""

    def __init__(self, config: EdmConfig) -> None:
        super().__init__(config)
        self.mean, self.std, self.data = config.p_mean, config.p_std, config.sigma_data

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t."""
        sigma = torch.exp(self.mean + self.std * torch.special.ndtri(u.double()))
        return (1.0 / (1.0 + self.data / sigma)).float()  # this form also bears sigma = 0 and infinity


class Law(Enum):
    """What `shifted` shifts."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass(kw_only=True, slots=True)
class ShiftedConfig(TimestepConfig):
    """Resolution shift t' = a t / (1 + (a - 1) t) of another law (SD3; spec 11).

    a is sqrt(tokens / base_tokens), Flux's e^mu, or fixed: large images need more noise to be destroyed. On logit_normal the shift
    only moves the mean, by log(a). SANA trains with a = 3.
    """

    law: Law = option(Law.logit_normal, "the law of t: logit_normal or uniform")
    mean: float = option(0.0, "mean of logit(t) before the shift, for logit_normal")
    std: float = option(1.0, "standard deviation of logit(t), for logit_normal")
    shift: float | None = option(None, "a; null: by the image tokens")
    resolution: Resolution = option(Resolution.sqrt, "a where shift is null: sqrt(tokens / base_tokens), or flux's e^mu")
    base_tokens: int = option(256, "image tokens at which a is 1, for sqrt")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a law that is none."""
        require(self.std > 0, f"timestep.std={self.std}: must be above 0")
        require(self.shift is None or self.shift > 0, f"timestep.shift={self.shift}: must be above 0; 1 shifts nothing")
        require(self.base_tokens > 0, f"timestep.base_tokens={self.base_tokens}: must be above 0")
        require(
            self.shift is not None or self.resolution is not Resolution.fixed,
            "timestep.resolution=fixed: needs timestep.shift, the a that is fixed; or use sqrt or flux",
        )


@TIMESTEP.register("shifted", ShiftedConfig)
class Shifted(Timestep):
    """Inverse CDF: the shift, which is increasing, of the law's inverse CDF."""

    def __init__(self, config: ShiftedConfig) -> None:
        super().__init__(config)
        self.config: ShiftedConfig = config

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t. Raises ValueError without `tokens` when the shift follows them."""
        c = self.config
        if c.shift is not None:
            a = c.shift
        elif tokens is not None:
            a = resolution_shift(c.resolution, tokens, base_tokens=c.base_tokens)
        else:
            raise ValueError("timestep=shifted follows the resolution and needs the number of image tokens")
        t = u.double() if c.law is Law.uniform else logit_normal(u, c.mean, c.std)
        return shift(t, a).float()


@dataclass(kw_only=True, slots=True)
class ModeConfig(TimestepConfig):
    """SD3's mode law: t = u + s (u - sin^2(pi u / 2)), heavier in the middle for s > 0 (Esser et al., 2024, eq. 20).

    The paper writes f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls from 1 to 0; this is f(1 - u), the quantile function.
    """

    scale: float = option(1.29, "s: 0 is uniform, below 0 heavier at both ends; from -1 to 2 / (pi - 2) = 1.75")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError where the map is not increasing."""
        require(
            -1 <= self.scale <= 2 / (math.pi - 2),
            f"timestep.scale={self.scale}: must be from -1 to 2 / (pi - 2) = 1.7519; beyond, t is no increasing function of u",
        )


@TIMESTEP.register("mode", ModeConfig)
class Mode(Timestep):
    """Inverse CDF: u + s (u - sin^2(pi u / 2))."""

    def __init__(self, config: ModeConfig) -> None:
        super().__init__(config)
        self.scale = config.scale

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t."""
        u = u.double()
        return (u + self.scale * (u - torch.sin(math.pi / 2 * u).square())).float()


@dataclass(kw_only=True, slots=True)
class CosmapConfig(TimestepConfig):
    """SD3's CosMap: t = 1 - 1 / (tan(pi u / 2) + 1), the log-SNR law of the cosine schedule (Esser et al., 2024, eq. 21).

    Density 2 / (pi (1 - 2 t + 2 t^2)).
    """


@TIMESTEP.register("cosmap", CosmapConfig)
class Cosmap(Timestep):
    """Inverse CDF: 1 - 1 / (tan(pi u / 2) + 1)."""

    def from_uniform(self, u: Float[Tensor, " B"], *, tokens: int | None = None) -> Float[Tensor, " B"]:
        """The u-quantile of t."""
        tangent = torch.tan(math.pi / 2 * u.double())
        return (tangent / (tangent + 1.0)).float()
