"""Planning: powers against statsmodels and closed forms, and the rule against its own simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from hdm.stats import axis_importance, holm, least_seeds, minimal_effect, pareto_front, seeds_needed, smallest_p
from hdm.stats.power import detection_rate, paired_power


@pytest.mark.parametrize("seeds", [2, 6, 12, 40])
@pytest.mark.parametrize("effect", [0.0, 0.3, 1.2])
def test_power_is_statsmodels(seeds, effect):
    expected = TTestPower().power(effect, seeds, 0.05, alternative="two-sided")
    assert paired_power(effect, seeds) == pytest.approx(expected, rel=1e-6)


def test_one_seed_has_no_power():
    assert paired_power(9.0, 1) == 0.0
    assert detection_rate(9.0, 5) == 0.0


@pytest.mark.parametrize(("comparisons", "seeds"), [(1, 6), (2, 7), (3, 7), (10, 9)])
def test_fewest_seeds_is_closed_form(comparisons, seeds):
    """m 2 / 2^n < 0.05 <=> n > 1 + log2(20 m)."""
    assert least_seeds(comparisons=comparisons) == seeds == math.floor(1 + math.log2(20 * comparisons)) + 1
    assert smallest_p(seeds) == 2 / 2**seeds
    assert math.isinf(minimal_effect(seeds - 1, comparisons=comparisons))
    assert math.isfinite(minimal_effect(seeds, comparisons=comparisons))


def test_six_seeds_must_all_have_one_sign():
    """Six seeds reject when all signs agree, which has probability F(d)^6 + F(-d)^6; the interval asks for more."""
    for effect in (0.5, 1.0, 2.0):
        ceiling = stats.norm.cdf(effect) ** 6 + stats.norm.cdf(-effect) ** 6
        assert detection_rate(effect, 6) <= ceiling + 0.03
    assert detection_rate(3.0, 6) == pytest.approx(stats.norm.cdf(3.0) ** 6, abs=0.03)


def test_minimal_effect_beyond_the_simulation_is_statsmodels():
    expected = TTestPower().solve_power(nobs=24, alpha=0.05 / 3, power=0.8, alternative="two-sided")
    assert minimal_effect(24, comparisons=3, spread=2.0) == pytest.approx(2 * expected, rel=2e-3)


def test_simulated_and_analytic_power_meet():
    assert minimal_effect(10) == pytest.approx(TTestPower().solve_power(nobs=10, alpha=0.05, power=0.8), rel=0.06)
    effects = [minimal_effect(seeds) for seeds in range(6, 20)]
    assert effects == sorted(effects, reverse=True)


def test_seeds_needed_inverts_minimal_effect():
    for effect in (0.4, 0.9, 1.5):
        seeds = seeds_needed(effect)
        assert minimal_effect(seeds) <= effect + 2e-3 < minimal_effect(seeds - 1) + 4e-3
    assert seeds_needed(1.8, spread=2.0) == seeds_needed(0.9)
    assert seeds_needed(0.001) is None


def test_holm_is_statsmodels():
    p = np.random.default_rng(0).random(20) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)
    assert holm([]) == []


def test_pareto_front_by_definition():
    points = np.random.default_rng(2).integers(0, 6, (60, 3)).astype(float)
    points[7, 1] = math.nan
    front = pareto_front(points)
    for i, on_front in enumerate(front):
        beaten = any(all(q <= points[i]) and any(q < points[i]) for q in points if np.isfinite(q).all())
        assert on_front == (np.isfinite(points[i]).all() and not beaten)
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [True, True]


def test_importance_is_the_share_of_the_variance():
    """An additive full factorial: the variance of each axis's effects over the sum of both."""
    a, b = {"0": 0.0, "1": 3.0, "2": 6.0, "3": 9.0}, {"x": 0.0, "y": 4.0, "z": 8.0}
    points = [{"a": i, "b": j, "same": "1"} for i in a for j in b]
    shares, method = axis_importance(points, [a[p["a"]] + b[p["b"]] for p in points])
    variances = {"a": np.var(list(a.values())), "b": np.var(list(b.values()))}
    assert method == "fANOVA"
    for axis, variance in variances.items():
        assert shares[axis] == pytest.approx(variance / sum(variances.values()), abs=0.08)
    assert axis_importance(points, [1.0] * len(points)) == ({}, "")
    assert axis_importance([{"a": "1"}, {"a": "2"}], [1.0, 2.0]) == ({}, "")
