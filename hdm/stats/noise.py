"""The noise floor: how far apart two arms come out that differ in nothing but the seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(kw_only=True, slots=True, frozen=True)
class NoiseFloor:
    """Measured by an A/A sweep: the standard deviation of one setting over seeds, with its degrees of freedom."""

    spread: float
    freedom: int

    @classmethod
    def of(cls, settings: Mapping[str, Sequence[float]]) -> "NoiseFloor | None":
        """Pooled within the settings of an A/A sweep, by setting its values over seeds; None without two seeds of any setting."""
        groups = [np.asarray(values, dtype=np.float64) for values in settings.values() if len(values) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        if not freedom:
            return None
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        return cls(spread=math.sqrt(squares / freedom), freedom=freedom)

    def band(self, seeds: int, *, confidence: float = 0.95) -> float:
        """b > 0: the difference of the means of two arms that are the same lies within ± b with probability `confidence`.

        Each mean is over `seeds` seeds that the other does not share: t s sqrt(2 / n). Arms of a sweep share their seeds, which can
        only make them closer, so the band is on the safe side.
        """
        if seeds < 1:
            return math.inf
        return float(stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.spread * math.sqrt(2 / seeds)
