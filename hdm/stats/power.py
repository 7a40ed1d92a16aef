"""Before the first run: what a number of seeds can show."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from hdm import rng

_SIMULATED = 10  # seeds up to which power is that of the rule itself; beyond, the t test's is as good
_DRAWS = 2000
_MOST_SEEDS = 10_000


def smallest_p(seeds: int) -> float:
    """The smallest two-sided sign-flip p of `seeds` paired differences: 2 / 2^n."""
    return min(1.0, math.ldexp(1.0, 1 - seeds))


def least_seeds(*, comparisons: int = 1, alpha: float = 0.05) -> int:
    """The fewest seeds with which a comparison can reach p < alpha after Holm over `comparisons`."""
    seeds = 1
    while comparisons * smallest_p(seeds) >= alpha:
        seeds += 1
    return seeds


def paired_power(effect: float, seeds: int, *, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test for a mean difference of `effect` standard deviations of the differences.

    |T| > t of n - 1 degrees of freedom, T noncentral with effect sqrt(n).
    """
    if seeds < 2:
        return 0.0
    critical, shift = float(stats.t.ppf(1 - alpha / 2, seeds - 1)), effect * math.sqrt(seeds)
    return float(stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift))


def detection_rate(effect: float, seeds: int, *, comparisons: int = 1, alpha: float = 0.05) -> float:
    """How often a true difference of `effect` standard deviations is called better or worse, with normal differences.

    By the rule of `hdm.stats.compare`: sign-flip p below alpha / comparisons, which is Holm's first step, and a t interval that
    excludes zero. Up to 10 seeds sign flips are too coarse for the t test's power to describe them, so the rule is applied to 2000
    draws (standard error 0.009 at 0.8), the same ones at each call. With more seeds it is the power of the t test.
    """
    if comparisons * smallest_p(seeds) >= alpha:
        return 0.0
    if seeds > _SIMULATED:
        return paired_power(effect, seeds, alpha=alpha / comparisons)
    draws = _draws(seeds) + effect
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(seeds))
    found = np.abs(t) > stats.t.ppf(1 - alpha / 2, seeds - 1)
    found[found] = _flip_p(draws[found]) < alpha / comparisons
    return float(found.mean())


def minimal_effect(seeds: int, *, spread: float = 1.0, comparisons: int = 1, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that `seeds` paired seeds show with probability `power`, against Holm over `comparisons`.

    `spread` is the standard deviation of the paired differences; the result is in its unit. Infinite where no difference, however
    large, can reach p < alpha (see `least_seeds`).
    """
    if comparisons * smallest_p(seeds) >= alpha:
        return math.inf
    return spread * _minimal(seeds, comparisons, alpha, power)


def seeds_needed(
    effect: float, *, spread: float = 1.0, comparisons: int = 1, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """The fewest seeds that show a true difference of `effect` with probability `power`; None for more than 10,000."""
    size, seeds = abs(effect) / spread, least_seeds(comparisons=comparisons, alpha=alpha)
    if paired_power(size, _MOST_SEEDS, alpha=alpha / comparisons) < power:
        return None
    while detection_rate(size, seeds, comparisons=comparisons, alpha=alpha) < power:
        seeds += 1
    return seeds


@lru_cache(maxsize=128)
def _minimal(seeds: int, comparisons: int, alpha: float, power: float) -> float:
    def excess(effect: float) -> float:
        return detection_rate(effect, seeds, comparisons=comparisons, alpha=alpha) - power

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(optimize.bisect(excess, 0.0, high, xtol=1e-3))


@lru_cache(maxsize=16)
def _draws(seeds: int) -> NDArray[np.float64]:
    return rng.generator(0, "stats/power", seeds).standard_normal((_DRAWS, seeds))


def _flip_p(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exact sign-flip p of every row."""
    seeds = draws.shape[1]
    codes = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds) & 1  # the last sign stays: p is the same for d and -d
    signs = 1.0 - 2.0 * codes
    p = np.empty(len(draws))
    for start in range(0, len(draws), 500):
        block = draws[start : start + 500]
        observed = np.abs(block.sum(axis=1)) - 1e-12 * np.abs(block).sum(axis=1)
        p[start : start + 500] = (np.abs(signs @ block.T) >= observed).mean(axis=0)
    return p
