"""The learning rate over the run, as a factor of every tensor's base rate."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from hdm.config.axes import SCHEDULE
from hdm.config.check import require
from hdm.config.registry import option
from hdm.config.schema import RunConfig


class Decay(Enum):
    """How a factor falls from 1 to the floor while u runs from 0 to 1."""

    one_minus_sqrt = "one_minus_sqrt"
    linear = "linear"


class Schedule:
    """A factor in [0, 1] for every step."""

    def factor(self, *, step: int, progress: float) -> float:
        """The factor of `step` (the first is 1), taken when the fraction `progress` of the budget has been used."""
        raise NotImplementedError


@dataclass(kw_only=True, slots=True)
class CosineConfig:
    """Linear warm-up, then half a cosine down to `floor` at the end of the budget (spec 1.4)."""

    decays: ClassVar[bool] = True

    warmup: int = option(1000, "steps of linear warm-up")
    floor: float = option(0.01, "factor at the end of the run")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for factors outside [0, 1]."""
        require(self.warmup >= 0, f"schedule.warmup={self.warmup}: must be 0 or above")
        require(0 <= self.floor <= 1, f"schedule.floor={self.floor}: must be between 0 and 1")


@SCHEDULE.register("cosine", CosineConfig)
class Cosine(Schedule):
    """min(1, step / warmup) x (floor + (1 - floor) (1 + cos(pi progress)) / 2)."""

    def __init__(self, config: CosineConfig) -> None:
        self.warmup, self.floor = config.warmup, config.floor

    def factor(self, *, step: int, progress: float) -> float:
        """The factor of `step`."""
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return _warm(step, self.warmup) * (self.floor + (1 - self.floor) * cosine)


@dataclass(kw_only=True, slots=True)
class ConstantConfig:
    """Linear warm-up, then the base rate to the end."""

    warmup: int = option(1000, "steps of linear warm-up")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a negative warm-up."""
        require(self.warmup >= 0, f"schedule.warmup={self.warmup}: must be 0 or above")


@SCHEDULE.register("constant", ConstantConfig)
class Constant(Schedule):
    """min(1, step / warmup)."""

    def __init__(self, config: ConstantConfig) -> None:
        self.warmup = config.warmup

    def factor(self, *, step: int, progress: float) -> float:
        """The factor of `step`."""
        return _warm(step, self.warmup)


@dataclass(kw_only=True, slots=True)
class LinearConfig:
    """Linear warm-up, then a straight line down to `floor` at the end of the budget (Defazio et al., arXiv 2310.07831)."""

    decays: ClassVar[bool] = True

    warmup: int = option(1000, "steps of linear warm-up")
    floor: float = option(0.0, "factor at the end of the run")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for factors outside [0, 1]."""
        require(self.warmup >= 0, f"schedule.warmup={self.warmup}: must be 0 or above")
        require(0 <= self.floor <= 1, f"schedule.floor={self.floor}: must be between 0 and 1")


@SCHEDULE.register("linear", LinearConfig)
class Linear(Schedule):
    """min(1, step / warmup) x (floor + (1 - floor) (1 - progress))."""

    def __init__(self, config: LinearConfig) -> None:
        self.warmup, self.floor = config.warmup, config.floor

    def factor(self, *, step: int, progress: float) -> float:
        """The factor of `step`."""
        return _warm(step, self.warmup) * (self.floor + (1 - self.floor) * (1 - min(progress, 1.0)))


@dataclass(kw_only=True, slots=True)
class WsdConfig:
    """Warm-up, stable, decay: the base rate until the last part of the budget, then down to `floor` (MiniCPM, arXiv 2404.06395)."""

    decays: ClassVar[bool] = True

    warmup: int = option(1000, "steps of linear warm-up")
    decay: float = option(0.2, "last fraction of the budget, in which the rate falls")
    shape: Decay = option(
        Decay.one_minus_sqrt,
        "one_minus_sqrt: 1 - sqrt(u) (Hägele et al., arXiv 2405.18392); linear: 1 - u; u from 0 to 1 in the decay",
    )
    floor: float = option(0.0, "factor at the end of the run")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for fractions outside [0, 1]."""
        require(self.warmup >= 0, f"schedule.warmup={self.warmup}: must be 0 or above")
        require(
            0 < self.decay <= 1,
            f"schedule.decay={self.decay}: must be above 0 and at most 1, such as 0.2; without decay: schedule=constant",
        )
        require(0 <= self.floor <= 1, f"schedule.floor={self.floor}: must be between 0 and 1")


@SCHEDULE.register("wsd", WsdConfig)
class Wsd(Schedule):
    """min(1, step / warmup) x (floor + (1 - floor) shape(u)), u = (progress - (1 - decay)) / decay within [0, 1]."""

    def __init__(self, config: WsdConfig) -> None:
        self.config = config

    def factor(self, *, step: int, progress: float) -> float:
        """The factor of `step`."""
        c = self.config
        u = min(max((progress - (1 - c.decay)) / c.decay, 0.0), 1.0)
        fallen = 1 - math.sqrt(u) if c.shape is Decay.one_minus_sqrt else 1 - u
        return _warm(step, c.warmup) * (c.floor + (1 - c.floor) * fallen)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0
