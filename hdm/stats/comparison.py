"""Arms against a baseline, with a verdict in words. The protocol is that of docs/statistics.md."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from hdm.stats.multiple import holm
from hdm.stats.noise import NoiseFloor
from hdm.stats.paired import Interval, bca_interval, sign_flip_p, t_interval
from hdm.stats.power import least_seeds, smallest_p


class Verdict(StrEnum):
    """What a comparison came to."""

    better = "better"
    worse = "worse"
    inconclusive = "inconclusive"
    unreachable = "cannot reach significance"
    missing = "not measured"


@dataclass(kw_only=True, slots=True)
class Comparison:
    """One arm against the baseline over the seeds that both have; differences are arm - baseline.

    `left_out` are seeds that only one of the two has a finite value for. `interval` (t) and `bca` are of the mean difference, at
    1 - alpha, not widened for the other arms; `adjusted_p` is Holm's. `band` is half the width of the noise band, 0 without one.
    """

    name: str
    seeds: list[int]
    differences: list[float]
    left_out: list[int]
    alpha: float
    comparisons: int = 1
    p: float = 1.0
    adjusted_p: float = 1.0
    interval: Interval | None = None
    band: float = 0.0
    verdict: Verdict = Verdict.missing
    reason: str = field(default="")

    @property
    def mean(self) -> float:
        """Mean difference; NaN without a common seed."""
        return float(np.mean(self.differences)) if self.differences else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of the differences; NaN for fewer than two."""
        return float(np.std(self.differences, ddof=1)) if len(self.differences) > 1 else math.nan

    @property
    def bca(self) -> Interval | None:
        """The bootstrap's interval of the mean difference; None for fewer than eight seeds. Computed when asked for."""
        return bca_interval(self.differences, confidence=1 - self.alpha)

    @property
    def words(self) -> str:
        """The verdict as a person reads it: `better`, `inconclusive: inside the noise band`, `cannot reach p < 0.05 with 3 …`."""
        if self.verdict is Verdict.unreachable:
            return self.reason
        return f"{self.verdict}: {self.reason}" if self.reason else str(self.verdict)


def compare(
    baseline: Mapping[int, float],
    arms: Mapping[str, Mapping[int, float]],
    *,
    minimize: bool = True,
    alpha: float = 0.05,
    noise: NoiseFloor | None = None,
) -> list[Comparison]:
    """Compare every arm with `baseline`; both are values by seed, of which those that are not finite do not count.

    An arm is better or worse when all three say so: the sign-flip p after Holm over the arms is below `alpha`, the t interval
    excludes zero, and the mean difference is outside the noise band. Otherwise the comparison is inconclusive; and where no
    difference could have reached p < alpha with so few seeds, that is the verdict.
    """
    found = [_measured(name, baseline, values, alpha=alpha) for name, values in arms.items()]
    tested = [comparison for comparison in found if comparison.differences]
    for comparison, adjusted in zip(tested, holm([comparison.p for comparison in tested])):
        comparison.adjusted_p, comparison.comparisons = adjusted, len(tested)
        if noise is not None:
            comparison.band = noise.band(len(comparison.seeds), confidence=1 - alpha)
    for number, comparison in enumerate(tested):
        comparison.verdict, comparison.reason = _judged(comparison, minimize=minimize, reachable=_reachable(tested, number))
    return found


def _measured(name: str, baseline: Mapping[int, float], arm: Mapping[int, float], *, alpha: float) -> Comparison:
    ours = {seed for seed, value in arm.items() if math.isfinite(value)}
    theirs = {seed for seed, value in baseline.items() if math.isfinite(value)}
    seeds = sorted(ours & theirs)
    differences = [arm[seed] - baseline[seed] for seed in seeds]
    left_out = sorted((set(arm) | set(baseline)) - set(seeds))
    comparison = Comparison(name=name, seeds=seeds, differences=differences, left_out=left_out, alpha=alpha)
    if differences:
        comparison.p = sign_flip_p(differences)
        comparison.interval = t_interval(differences, confidence=1 - alpha)
    else:
        comparison.reason = "no seed has a value for both"
    return comparison


def _reachable(tested: list[Comparison], number: int) -> bool:
    """Whether the comparison would be below alpha with the smallest p that its seeds allow, the others being as they are."""
    p = [comparison.p for comparison in tested]
    p[number] = smallest_p(len(tested[number].seeds))
    return holm(p)[number] < tested[number].alpha


def _judged(comparison: Comparison, *, minimize: bool, reachable: bool) -> tuple[Verdict, str]:
    seeds, mean = len(comparison.seeds), comparison.mean
    if not reachable:
        least = least_seeds(comparisons=comparison.comparisons, alpha=comparison.alpha)
        among = f" among {comparison.comparisons} comparisons" if comparison.comparisons > 1 else ""
        few = f"{seeds} seeds" if seeds > 1 else "one seed"
        return Verdict.unreachable, f"cannot reach p < {comparison.alpha:g} with {few}{among}; {least} can"
    if abs(mean) <= comparison.band:
        return Verdict.inconclusive, "inside the noise band"
    if comparison.interval is None or 0.0 in comparison.interval:
        return Verdict.inconclusive, "the interval crosses 0"
    if comparison.adjusted_p >= comparison.alpha:
        return Verdict.inconclusive, f"p = {comparison.adjusted_p:.2g}" + (" after Holm" if comparison.comparisons > 1 else "")
    return (Verdict.better if (mean < 0) == minimize else Verdict.worse), ""
