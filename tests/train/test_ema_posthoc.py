"""Averages of any width out of stored ones: the integrals, the solution, and how well a trajectory's average is met."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.linalg import null_space

from hdm.train.ema import power_exponent
from hdm.train.posthoc import Profile, combine, inner

WIDTHS = st.floats(0.01, 0.28)


def profile(width, end):
    """p(tau) of section 3.1, as a function."""
    gamma = power_exponent(width)
    return lambda tau: (gamma + 1) * (tau / end) ** gamma / end if tau <= end else 0.0


def stored(count, widths=(0.05, 0.1), samples=1600):
    """Snapshots at equal distances, the last one at the end."""
    return [Profile(width=w, samples=samples * i // count) for i in range(1, count + 1) for w in widths]


def slower(profile, scale):
    return Profile(width=profile.width, samples=profile.samples * scale)


def direct(theta, samples, wanted):
    """The average of a trajectory whose row k holds from samples[k - 1] to samples[k], tracked step by step."""
    power, mean, before = power_exponent(wanted.width) + 1, np.zeros(theta.shape[1]), 0
    for row, now in zip(theta, samples):
        if now <= wanted.samples:
            beta = (before / now) ** power
            mean, before = beta * mean + (1 - beta) * row, now
    return mean


@given(a=WIDTHS, b=WIDTHS, s=st.floats(0.05, 1), t=st.floats(0.05, 1))
def test_inner_products_are_the_integrals(a, b, s, t):
    p, q = profile(a, s), profile(b, t)
    expected, error = quad(lambda tau: p(tau) * q(tau), 0, min(s, t), epsabs=0, epsrel=1e-11, limit=500)
    found = inner(power_exponent(a), s, power_exponent(b), t)
    assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-290)
    assert error <= 1e-8 * abs(expected) + 1e-290


@pytest.mark.parametrize("width", [0.03, 0.075, 0.15, 0.2])
@pytest.mark.parametrize("count", [2, 6])
def test_the_solution_is_numpys_least_squares(count, width):
    """Profiles on a fine Gauss-Legendre grid; x = 1/n + N y has sum 1 for every y, N spanning the vectors of sum 0."""
    known, wanted = stored(count, samples=60), Profile(width=width, samples=60)
    grid, weights = [], []
    for low, high in itertools.pairwise([0, *sorted({p.samples for p in known})]):  # smooth between snapshots
        nodes, w = np.polynomial.legendre.leggauss(80)
        grid.append((high - low) / 2 * nodes + (high + low) / 2)
        weights.append((high - low) / 2 * w)
    tau, root = np.concatenate(grid), np.sqrt(np.concatenate(weights))
    columns = np.array([[profile(p.width, p.samples)(t) for t in tau] for p in known]).T * root[:, None]
    target = np.array([profile(width, 60)(t) for t in tau]) * root
    start, free = np.full(len(known), 1 / len(known)), null_space(np.ones((1, len(known))))
    y = np.linalg.lstsq(columns @ free, target - columns @ start, rcond=None)[0]
    expected = start + free @ y
    found = combine(known, wanted)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-9)
    missing = np.linalg.norm(columns @ expected - target) / np.linalg.norm(target)
    assert found.residual == pytest.approx(missing, rel=1e-6)


@given(width=st.sampled_from([0.05, 0.1]), place=st.integers(1, 8))
def test_a_stored_average_is_returned_as_it_is(width, place):
    known = stored(8)
    wanted = Profile(width=width, samples=200 * place)
    found = combine(known, wanted)
    assert found.residual == 0
    assert {p: c for p, c in zip(known, found.coefficients) if c} == {wanted: 1.0}


@given(order=st.permutations(range(8)))
def test_the_order_of_the_snapshots_does_not_matter(order):
    known, wanted = stored(4), Profile(width=0.07, samples=1600)
    straight, shuffled = combine(known, wanted), combine([known[i] for i in order], wanted)
    np.testing.assert_allclose(shuffled.coefficients, straight.coefficients[list(order)], atol=1e-12)
    assert shuffled.residual == pytest.approx(straight.residual)


@given(width=WIDTHS, count=st.integers(1, 40), scale=st.integers(1, 1000))
def test_what_stands_still_stays_and_the_unit_of_time_cancels(width, count, scale):
    known, wanted = stored(count), Profile(width=width, samples=1600)
    small = combine(known, wanted)
    large = combine([slower(p, scale) for p in known], slower(wanted, scale))
    assert small.coefficients.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(large.coefficients, small.coefficients, atol=1e-6)


def walk(draw, steps):
    return draw.standard_normal(50) + 0.02 * np.cumsum(draw.standard_normal((steps, 50)), axis=0)


def noise_around_a_drift(draw, steps):
    return draw.standard_normal(50) + np.linspace(0, 1, steps)[:, None] ** 0.5 + 0.3 * draw.standard_normal((steps, 50))


SAMPLES = np.cumsum([1] * 800 + [5] * 160)  # the batch changes in the middle


@pytest.mark.parametrize(("count", "limit"), [(8, 1e-3), (16, 2e-4), (64, 2e-5)])
@pytest.mark.parametrize("trajectory", [walk, noise_around_a_drift])
def test_a_third_width_is_met_in_float64(trajectory, count, limit):
    """Against the same average tracked directly, between the stored widths, beyond them and (0.03, 0.2) far beyond them."""
    theta = trajectory(np.random.Generator(np.random.Philox(7)), len(SAMPLES))
    known = stored(count)
    averages = np.array([direct(theta, SAMPLES, p) for p in known])
    for width, slack in ((0.075, 1), (0.15, 1), (0.03, 10), (0.2, 10)):
        wanted = Profile(width=width, samples=1600)
        expected = direct(theta, SAMPLES, wanted)
        missed = np.linalg.norm(combine(known, wanted).coefficients @ averages - expected)
        assert missed <= slack * limit * np.linalg.norm(expected), width
        nearest = min(np.linalg.norm(average - expected) for average in averages)
        assert missed < nearest / 3, width


@given(width=st.floats(0.02, 0.28), count=st.integers(2, 20), seed=st.integers(0, 100))
def test_the_error_is_within_what_the_residual_says(width, count, seed):
    """The error is the integral of (sum - profile) (theta - any constant): Cauchy-Schwarz bounds it by the product of the norms."""
    theta = walk(np.random.Generator(np.random.Philox(seed)), 80)
    samples, known, wanted = 20 * np.arange(1, 81), stored(count, samples=20 * count), Profile(width=width, samples=20 * count)
    found = combine(known, wanted)
    missed = found.coefficients @ np.array([direct(theta, samples, p) for p in known]) - direct(theta, samples, wanted)
    seen = theta[:count]
    gamma = power_exponent(width)
    norm = np.sqrt((gamma + 1) ** 2 / (2 * gamma + 1) / wanted.samples)
    spread = np.sqrt(20 * np.sum((seen - seen.mean(axis=0)) ** 2))
    assert np.linalg.norm(missed) <= found.residual * norm * spread + 1e-9


def test_there_is_nothing_without_stored_averages():
    with pytest.raises(ValueError, match="no stored averages"):
        combine([], Profile(width=0.1, samples=1))
