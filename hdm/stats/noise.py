"""The noise floor: how far apart two arms come out that do not differ in anything that matters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(kw_only=True, slots=True, frozen=True)
class NoiseFloor:
    """Measured by an A/A sweep: the standard deviation of equal arms, with its degrees of freedom.

    `paired`: among arms of one seed, free of what the seed does to all of them alike. Otherwise over the seeds of one setting.
    """

    spread: float
    freedom: int
    paired: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Mapping[int, float]]) -> "NoiseFloor | None":
        """From the values by seed of each setting of an A/A sweep, of which those that are not finite do not count.

        An A/A sweep is paired when two of its settings share two seeds or more. It is pooled within seeds then, and within settings
        otherwise: s^2 = sum of squares about the means of the groups / (values - groups). None without a group of two values. Means
        of settings are not taken off: in an A/A sweep they are equal, and where they are not the band is wider for it.
        """
        seeds: dict[int, list[float]] = {}
        for values in settings.values():
            for seed, value in values.items():
                if math.isfinite(value):
                    seeds.setdefault(seed, []).append(value)
        paired = sum(len(group) > 1 for group in seeds.values()) > 1
        within = [[value for value in values.values() if math.isfinite(value)] for values in settings.values()]
        groups = [np.asarray(group, dtype=np.float64) for group in (seeds.values() if paired else within) if len(group) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        if not freedom:
            return None
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        return cls(spread=math.sqrt(squares / freedom), freedom=freedom, paired=paired)

    def band(self, seeds: int, *, confidence: float = 0.95) -> float:
        """b > 0: the mean difference of two arms that are the same lies within ± b with probability `confidence`.

        b = t s sqrt(2 / n) over `seeds` n, with t of `freedom` degrees of freedom: s sqrt(2) is the standard deviation of a
        difference, of paired ones if the A/A sweep was paired. If it was not, the two means are taken for means over seeds that the
        other does not share. Arms of a sweep share theirs, which can only bring them closer, so that band errs on the safe side.
        """
        if seeds < 1:
            return math.inf
        return float(stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.spread * math.sqrt(2 / seeds)
