"""One set of paired differences: its t interval, its exact sign-flip p-value, its BCa bootstrap interval."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hdm import rng

EXACT = 30  # differences up to which every flip is counted; beyond, SAMPLES of them are drawn
SAMPLES = 99_999
RESAMPLES = 9_999
LEAST_BCA = 8  # differences; with fewer the bootstrap knows too few values to choose from
_TIE = 1e-12  # of the sum of |d|: flips that are as extreme as what was observed, but for rounding


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def t_interval(differences: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """mean ± t sd / sqrt(n), with n - 1 degrees of freedom; None for fewer than two differences."""
    d = _array(differences)
    if len(d) < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(d) - 1)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    mean = float(d.mean())
    return Interval(low=mean - half, high=mean + half)


def sign_flip_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p of "each difference might as well have had the other sign", by the size of the mean.

    Of the 2^n ways to set the signs, the share whose mean is as far from zero as the one observed: 2 / 2^n at least. Exact up to
    EXACT differences; beyond, of SAMPLES random flips, drawn by `seed`, and the observed one. Valid whatever the law of the
    differences is, as long as it is symmetric about zero when the arms do not differ (Fisher, 1935).
    """
    d = _array(differences)
    threshold = abs(float(d.sum())) - _TIE * float(np.abs(d).sum())
    if threshold <= 0:
        return 1.0
    if len(d) > EXACT:
        signs = rng.generator(seed, "stats/sign_flip").integers(0, 2, (SAMPLES, len(d)), dtype=np.int8) * 2.0 - 1
        return float(1 + np.count_nonzero(np.abs(signs @ d) >= threshold)) / (1 + SAMPLES)
    # Every sum is one of the first half's plus one of the second half's: sorting one half counts all pairs.
    half = len(d) // 2
    left, right = _signed_sums(d[:half]), np.sort(_signed_sums(d[half:]))
    above = len(right) * len(left) - int(np.searchsorted(right, threshold - left, side="left").sum())
    below = int(np.searchsorted(right, -threshold - left, side="right").sum())
    return float((above + below) / 2 ** len(d))


def bca_interval(differences: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval | None:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron, 1987) from RESAMPLES resamples.

    None for fewer than LEAST_BCA differences. Resamples are drawn by `seed` and the number of differences alone.
    """
    d = _array(differences)
    if len(d) < LEAST_BCA:
        return None
    if np.ptp(d) == 0:
        return Interval(low=float(d[0]), high=float(d[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (d,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="BCa",
            rng=rng.generator(seed, "stats/bca", len(d)),
        ).confidence_interval
    return Interval(low=float(found.low), high=float(found.high))


def _signed_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums of ± each value: 2^n of them."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _array(differences: Sequence[float]) -> NDArray[np.float64]:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not np.isfinite(d).all():
        raise ValueError("differences must be a list of finite numbers")
    return d
