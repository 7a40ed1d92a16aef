"""The noise band: closed forms, and simulations of what it promises."""

import math

import numpy as np
import pytest
from scipy import stats

from hdm.stats import NoiseFloor, Verdict, compare

SWEEPS = 200


def by_setting(rows):
    return {name: dict(enumerate(map(float, row))) for name, row in zip(("one", "other", "third"), rows)}


def test_noise_band_holds_the_share_that_it_promises():
    """Arms that are the same, of 6 seeds each, the spread measured on 12 others: |difference| is inside in 95 % of cases."""
    draws = np.random.default_rng(5).normal(3.0, 0.2, (4000, 24))
    inside = 0
    for row in draws:
        floor = NoiseFloor.of({"": dict(enumerate(row[:12]))})
        inside += abs(row[12:18].mean() - row[18:].mean()) <= floor.band(6)
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_noise_floor_pools_settings_that_share_no_seeds():
    floor = NoiseFloor.of({"a": {0: 1.0, 1: 3.0}, "b": {2: 10.0, 3: 11.0, 4: 12.0}, "c": {5: 5.0, 0: math.nan}})
    assert (floor.spread, floor.freedom, floor.paired) == (pytest.approx(math.sqrt((2 + 2) / 3)), 3, False)
    assert floor.band(8) == pytest.approx(stats.t.ppf(0.975, 3) * floor.spread * 0.5)
    assert NoiseFloor.of({"a": {0: 1.0}, "b": {0: 2.0}}) is None


def test_a_paired_noise_floor_is_that_of_paired_differences():
    """Of two settings: s sqrt(2) is the root mean square of the differences, about 0 since equal arms have equal means."""
    twins = {"one": {0: 1.0, 1: 5.0, 2: 9.0, 3: 7.0}, "other": {0: 1.3, 1: 4.9, 2: 9.2}}
    floor = NoiseFloor.of(twins)
    rms = math.sqrt((0.3**2 + 0.1**2 + 0.2**2) / 3)
    assert (floor.spread, floor.freedom, floor.paired) == (pytest.approx(rms / math.sqrt(2)), 3, True)
    assert floor.band(6) == pytest.approx(stats.t.ppf(0.975, 3) * rms / math.sqrt(6))


@pytest.mark.parametrize("settings", [2, 3])
def test_sweeps_of_equal_arms_leave_the_paired_band_as_seldom_as_promised(settings):
    """200 A/A sweeps, each judged by the band of another one: one in twenty comparisons lies outside, however seeds differ."""
    rng = np.random.default_rng(30 + settings)
    outside = 0
    for _ in range(SWEEPS):
        seeds = rng.normal(0, 3, 6)
        floor = NoiseFloor.of(by_setting(seeds + rng.normal(0, 0.1, (settings, 6))))
        first, second = rng.normal(0, 3, 6) + rng.normal(0, 0.1, (2, 6))
        outside += abs((second - first).mean()) > floor.band(6)
    low, high = stats.binom.ppf([0.0005, 0.9995], SWEEPS, 0.05)
    assert low <= outside <= high


def test_no_sweep_of_equal_arms_has_a_winner_more_often_than_alpha_and_pairing_finds_what_the_wide_band_hides():
    rng = np.random.default_rng(33)
    wrong = found = hidden = 0
    for _ in range(SWEEPS):
        aa = by_setting(rng.normal(0, 3, 8) + rng.normal(0, 0.1, (2, 8)))
        wide = NoiseFloor.of({"one": aa["one"]})
        base, equal, better = rng.normal(0, 3, 8) + rng.normal(0, 0.1, (3, 8))
        arms = by_setting(np.stack([equal, better - 0.5]))
        verdicts = [c.verdict for c in compare(dict(enumerate(base)), arms, noise=NoiseFloor.of(aa))]
        wrong += verdicts[0] in (Verdict.better, Verdict.worse)
        found += verdicts[1] is Verdict.better
        hidden += compare(dict(enumerate(base)), arms, noise=wide)[1].reason == "inside the noise band"
    assert wrong <= stats.binom.ppf(0.999, SWEEPS, 0.05)
    assert found > 0.95 * SWEEPS
    assert hidden > 0.95 * SWEEPS
