"""Intervals and p-values of paired differences against scipy, statsmodels, closed forms and the laws that they obey."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from hdm.stats import paired
from hdm.stats.paired import bca_interval, sign_flip_p, t_interval

DIFFERENCES = np.random.default_rng(0).normal(0.4, 1.0, 9)
# whole numbers over 8: sums, negations and products with powers of two are exact in floating point
EIGHTHS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=2, max_size=12)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_t_interval_is_statsmodels(confidence):
    interval = t_interval(DIFFERENCES, confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx(DescrStatsW(DIFFERENCES).tconfint_mean(1 - confidence), rel=1e-12)


def test_t_interval_of_two_is_closed_form():
    """One degree of freedom is the Cauchy law: t = tan(pi (q - 1/2)); sd of (0, 2) is sqrt(2)."""
    half = math.tan(math.pi * (0.975 - 0.5)) * math.sqrt(2) / math.sqrt(2)
    interval = t_interval([0.0, 2.0])
    assert (interval.low, interval.high) == pytest.approx((1 - half, 1 + half), rel=1e-9)
    assert t_interval([1.0]) is None


@pytest.mark.parametrize("count", [2, 5, 9, 12])
def test_sign_flip_is_scipys_exact_permutation_test(count):
    d = np.random.default_rng(count).normal(0.5, 1, count)
    expected = stats.permutation_test(
        (d, np.zeros(count)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(d) == pytest.approx(expected.pvalue, rel=1e-12)


@given(
    st.integers(1, 13).flatmap(
        lambda n: st.tuples(st.permutations(range(1, n + 1)), st.lists(st.booleans(), min_size=n, max_size=n))
    )
)
@settings(max_examples=40, deadline=None)
def test_sign_flip_of_ranks_is_wilcoxons_test(drawn):
    ranks, signs = drawn
    d = [rank if sign else -rank for rank, sign in zip(ranks, signs)]
    assert sign_flip_p(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 6, 8, 20, 30])
def test_smallest_p_is_2_over_2_to_the_n(count):
    assert sign_flip_p(np.arange(1.0, count + 1)) == pytest.approx(2 / 2**count, rel=1e-12)


def test_ties_count_as_as_extreme():
    """0.1 x 3: every flip that leaves all signs equal ties with what was observed, although the sums differ in rounding."""
    assert sign_flip_p([0.1, 0.2, 0.3]) == 2 / 8
    assert sign_flip_p([0.3, 0.3, -0.3]) == 1.0
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_many_differences_are_sampled_and_near_the_exact_value(monkeypatch):
    d = np.random.default_rng(1).normal(0.3, 1, 36)
    sampled = sign_flip_p(d)
    assert sampled == sign_flip_p(d)
    assert sampled != sign_flip_p(d, seed=1)
    monkeypatch.setattr(paired, "EXACT", 36)
    exact = sign_flip_p(d)
    assert abs(sampled - exact) < 4 * math.sqrt(exact * (1 - exact) / paired.SAMPLES)
    assert exact == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=0.1)


@given(EIGHTHS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_p_knows_neither_order_nor_unit_nor_direction(d, random):
    p = sign_flip_p(d)
    assert 2 / 2 ** len(d) <= p <= 1
    assert sign_flip_p(random.sample(d, len(d))) == p
    assert sign_flip_p([-4 * x for x in d]) == p


@given(EIGHTHS, st.integers(-64, 64), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_t_interval_moves_with_shift_scale_sign_and_ignores_order(d, shift, random):
    interval = t_interval(d)
    for other, low, high in (
        (t_interval([x + shift for x in d]), interval.low + shift, interval.high + shift),
        (t_interval([4 * x for x in d]), 4 * interval.low, 4 * interval.high),
        (t_interval([-x for x in d]), -interval.high, -interval.low),
        (t_interval(random.sample(d, len(d))), interval.low, interval.high),
    ):
        assert (other.low, other.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def bca_by_the_book(d, confidence, resamples):
    """Efron (1987): percentiles of the bootstrap law, shifted by z0 and the acceleration a."""
    draws = np.random.default_rng(7).choice(d, (resamples, len(d))).mean(axis=1)
    below = (np.sum(draws < d.mean()) + np.sum(draws == d.mean()) / 2) / resamples
    z0 = stats.norm.ppf(below)
    jackknife = np.array([np.delete(d, i).mean() for i in range(len(d))])
    u = jackknife.mean() - jackknife
    a = np.sum(u**3) / (6 * np.sum(u**2) ** 1.5)
    z = stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    return np.quantile(draws, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))


@pytest.mark.parametrize("skewed", [False, True])
def test_bca_is_efrons_formula(skewed):
    d = np.random.default_rng(3).exponential(1, 12) if skewed else DIFFERENCES
    interval, expected = bca_interval(d), bca_by_the_book(d, 0.95, 200_000)
    width = expected[1] - expected[0]
    assert abs(interval.low - expected[0]) < 0.03 * width
    assert abs(interval.high - expected[1]) < 0.03 * width


def test_bca_needs_eight_and_survives_equal_values():
    assert bca_interval(DIFFERENCES[:7]) is None
    assert bca_interval([0.5] * 8) == paired.Interval(low=0.5, high=0.5)


@given(st.lists(st.integers(-80, 80), min_size=8, max_size=10).filter(lambda d: len(set(d)) > 2))
@settings(max_examples=5, deadline=None)
def test_bca_scales_with_the_differences(d):
    interval, scaled = bca_interval(d), bca_interval([4.0 * x for x in d])
    assert (scaled.low, scaled.high) == pytest.approx((4 * interval.low, 4 * interval.high), rel=1e-9, abs=1e-9)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        sign_flip_p([1.0, math.nan])
