"""Verdicts, and the proof by simulation that they err as seldom as they promise and find what they are planned to find."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hdm.stats import NoiseFloor, Verdict, compare, minimal_effect

FOUND = (Verdict.better, Verdict.worse)
SWEEPS = 200


def sweeps(rng, arms, seeds, effects=None):
    """Values (baseline by seed, arm: by seed) of one synthetic sweep: a part that all arms share by pairing, and one of their own.

    The own parts have variance 1/2, so that differences have standard deviation 1.
    """
    shared = rng.normal(0, 3, seeds)
    values = shared + rng.normal(0, math.sqrt(0.5), (arms + 1, seeds))
    values[1:] += np.zeros((arms, 1)) if effects is None else np.reshape(effects, (arms, 1))
    by_seed = [dict(enumerate(map(float, row))) for row in values]
    return by_seed[0], {f"arm{i}": row for i, row in enumerate(by_seed[1:])}


def most(rate, trials):
    """More successes than this happen once in a thousand times at `rate`."""
    return stats.binom.ppf(0.999, trials, rate)


def test_sweeps_of_equal_arms_are_rarely_called_different():
    rng = np.random.default_rng(11)
    wrong = [any(c.verdict in FOUND for c in compare(*sweeps(rng, 3, 8))) for _ in range(SWEEPS)]
    assert sum(wrong) <= most(0.05, SWEEPS)


def test_without_holm_many_arms_would_be_called_different():
    """What Holm is for: ten equal arms against one baseline, judged one by one, and judged together."""
    rng = np.random.default_rng(12)
    alone = together = 0
    for _ in range(SWEEPS):
        baseline, arms = sweeps(rng, 10, 10)
        alone += any(compare(baseline, {name: arm})[0].verdict in FOUND for name, arm in arms.items())
        together += any(c.verdict in FOUND for c in compare(baseline, arms))
    assert alone > most(0.05, SWEEPS)
    assert together <= most(0.05, SWEEPS)


def test_holm_protects_equal_arms_beside_real_ones():
    rng = np.random.default_rng(13)
    wrong = 0
    for _ in range(SWEEPS):
        found = compare(*sweeps(rng, 5, 10, effects=[4.0, -4.0, 0, 0, 0]))
        assert [c.verdict for c in found[:2]].count(Verdict.inconclusive) <= 1
        wrong += any(c.verdict in FOUND for c in found[2:])
    assert wrong <= most(0.05, SWEEPS)


@pytest.mark.parametrize(("seeds", "arms"), [(6, 1), (8, 1), (8, 3), (14, 1)])
def test_a_planted_effect_is_found_at_the_planned_power(seeds, arms):
    """The other arms differ so clearly that Holm leaves all of alpha to the one that is looked at."""
    rng = np.random.default_rng(seeds + arms)
    effect = minimal_effect(seeds, comparisons=1)
    found = 0
    for _ in range(SWEEPS):
        comparisons = compare(*sweeps(rng, arms, seeds, effects=[-effect] + [50.0] * (arms - 1)))
        found += comparisons[0].verdict is Verdict.better
    low, high = stats.binom.ppf([0.0005, 0.9995], SWEEPS, 0.8)
    assert low <= found <= high


def test_a_planted_effect_among_equal_arms_is_found_at_least_as_often_as_planned():
    rng = np.random.default_rng(21)
    effect = minimal_effect(10, comparisons=4)
    found = [compare(*sweeps(rng, 4, 10, effects=[effect, 0, 0, 0]))[0].verdict is Verdict.worse for _ in range(SWEEPS)]
    assert sum(found) >= stats.binom.ppf(0.0005, SWEEPS, 0.8)


def values(*numbers):
    return dict(enumerate(numbers))


BASE = values(1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.02, 0.98)


def shifted(by, wobble=0.001):
    return {seed: v + by + wobble * (-1) ** seed for seed, v in BASE.items()}


def test_verdicts_follow_the_direction():
    (lower,) = compare(BASE, {"x": shifted(-0.1)})
    assert (lower.verdict, lower.words) == (Verdict.better, "better")
    assert lower.p == 2 / 2**8
    assert compare(BASE, {"x": shifted(-0.1)}, minimize=False)[0].verdict is Verdict.worse
    assert lower.mean == pytest.approx(-0.1)
    assert lower.bca.high < 0


def test_difference_inside_the_noise_band_is_inconclusive():
    noise = NoiseFloor(spread=0.1, freedom=11)
    (inside,) = compare(BASE, {"x": shifted(-0.05)}, noise=noise)
    assert inside.band == pytest.approx(stats.t.ppf(0.975, 11) * 0.1 * math.sqrt(2 / 8))
    assert inside.words == "inconclusive: inside the noise band"
    assert compare(BASE, {"x": shifted(-0.5)}, noise=noise)[0].verdict is Verdict.better


def test_interval_that_crosses_zero_is_inconclusive():
    (found,) = compare(BASE, {"x": shifted(0.01, wobble=0.5)})
    assert found.words == "inconclusive: the interval crosses 0"


@pytest.mark.parametrize(
    ("seeds", "words"), [(5, "cannot reach p < 0.05 with 5 seeds; 6 can"), (1, "cannot reach p < 0.05 with one seed; 6 can")]
)
def test_few_seeds_cannot_reach_significance_however_large_the_effect(seeds, words):
    few = {seed: BASE[seed] for seed in range(seeds)}
    (found,) = compare(few, {"x": {seed: v - 100 for seed, v in few.items()}})
    assert (found.verdict, found.words) == (Verdict.unreachable, words)


def test_six_seeds_are_too_few_for_two_comparisons_unless_the_other_is_settled():
    six = {seed: BASE[seed] for seed in range(6)}
    one, two = (c.words for c in compare(six, {"x": shifted(0), "y": shifted(-1)}))
    assert one == two == "cannot reach p < 0.05 with 6 seeds among 2 comparisons; 7 can"
    many = {seed: float(seed % 3) for seed in range(12)}
    far, near = compare(many, {"far": {s: v - 1 for s, v in many.items()}, "near": {s: many[s] - 1 for s in range(6)}})
    assert (far.verdict, near.verdict) == (Verdict.better, Verdict.better)


def test_only_common_seeds_with_finite_values_count():
    arm = {0: 0.5, 1: math.nan, 2: math.inf, 9: 0.1}
    (found,) = compare(values(1.0, 1.0, 1.0, 1.0), {"x": arm})
    assert (found.seeds, found.left_out, found.differences) == ([0], [1, 2, 3, 9], [-0.5])
    (none,) = compare(values(1.0), {"x": {5: 1.0}})
    assert none.words == "not measured: no seed has a value for both"
    assert math.isnan(none.mean)


@given(st.lists(st.integers(-40, 40), min_size=6, max_size=9), st.integers(-9, 9))
@settings(max_examples=40, deadline=None)
def test_what_is_added_to_both_arms_changes_nothing_and_swapping_them_swaps_the_verdict(differences, level):
    base = dict.fromkeys(range(len(differences)), 2.0)
    arm = {seed: 2.0 + d / 8 for seed, d in enumerate(differences)}
    (found,) = compare(base, {"x": arm})
    (moved,) = compare({s: v + level for s, v in base.items()}, {"x": {s: v + level for s, v in arm.items()}})
    assert (moved.verdict, moved.p, moved.differences) == (found.verdict, found.p, found.differences)
    (swapped,) = compare(arm, {"x": base})
    opposite = {Verdict.better: Verdict.worse, Verdict.worse: Verdict.better}
    assert swapped.verdict is opposite.get(found.verdict, found.verdict)
