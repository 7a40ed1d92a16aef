"""Samplers against flows whose solution is known in closed form. `test_parity.py` holds them to diffusers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hdm import rng
from hdm.config.axes import SAMPLER
from hdm.config.errors import ConfigError
from hdm.config.schema import Resolution
from hdm.diffusion.sampler import (
    Dpmpp2m,
    Dpmpp2mConfig,
    Euler,
    EulerConfig,
    EulerMaruyama,
    EulerMaruyamaConfig,
    Heun,
    HeunConfig,
    time_grid,
)

NAMES = SAMPLER.names()


def sampler(name, **fields):
    return SAMPLER.build(SAMPLER.get(name).config(**fields))


def fresh_of(noise, seed=0):
    """Standard normal float32 noise of every step, keyed as the generator keys it."""
    return lambda step: torch.from_numpy(rng.normal(seed, f"step/{step}", range(len(noise)), noise.shape[1:]))


def gaussian_velocity(mean: float, std: float):
    """E[eps - x | x_t] for data x ~ N(mean, std^2): regression of eps - x on x_t = (1-t) x + t eps."""

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        covariance = t - (1 - t) * std**2
        return -mean + covariance / variance * (x - (1 - t) * mean)

    return velocity


def on_path(quantile, t: float, mean: float, std: float):
    """The flow keeps quantiles: where a path through the quantile's noise stands at t, between N(0, 1) and N(mean, std^2)."""
    return (1 - t) * mean + math.sqrt((1 - t) ** 2 * std**2 + t**2) * quantile


def mixture_velocity(x, t, std=0.3):
    """E[eps - x | x_t] for data from N(-1, std^2) or N(1, std^2), one as likely as the other."""
    t = t.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * std**2 + t**2
    side = torch.tanh((1 - t) * x / variance)
    image = side + (1 - t) * std**2 / variance * (x - (1 - t) * side)
    return (x - image) / t


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_constant_velocity_is_integrated_exactly(name):
    noise, data = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    for steps in (1, 2, 7):
        x = sampler(name, steps=steps).sample(lambda x, t: noise - data, noise)
        torch.testing.assert_close(x, data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time_shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order", "tolerance"), [("euler", 1, 0.1), ("heun", 2, 0.05), ("dpmpp_2m", 2, 0.4)])
def test_gaussian_flow_converges_at_the_order_of_the_method(name, order, tolerance, time_shift):
    """DPM++ 2M, with first-order steps at both ends, has h^2 log(1/h) over the whole path; see the next test."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    exact = on_path(noise, 0.0, mean=0.7, std=0.4)

    def error(steps):
        x = sampler(name, steps=steps, time_shift=time_shift).sample(gaussian_velocity(0.7, 0.4), noise)
        return (x - exact).abs().max().item()

    errors = [error(steps) for steps in (512, 1024, 2048)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < {1: 5e-3, 2: 5e-5}[order]
    assert all(abs(found - order) < tolerance for found in orders), orders


def test_dpmpp_2m_is_of_second_order_between_the_ends():
    quantile = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)

    def error(steps):
        solver = Dpmpp2m(Dpmpp2mConfig(steps=steps))
        solver.times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        x = solver.sample(gaussian_velocity(0.7, 0.4), on_path(quantile, 0.9, 0.7, 0.4))
        return (x - on_path(quantile, 0.1, 0.7, 0.4)).abs().max().item()

    orders = [math.log2(a / b) for a, b in pairwise(map(error, (64, 128, 256)))]
    assert all(abs(order - 2) < 0.1 for order in orders), orders


def test_euler_maruyama_in_one_step_and_on_the_way():
    """float64: x - dt (v - t score) + sqrt(2 t dt) z, with the score of the Gaussian itself; the last step without z."""
    mean, std, last = 0.7, 0.4, 0.25
    x, z = torch.randn(2, 5, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    solver = EulerMaruyama(EulerMaruyamaConfig(steps=2, last=last))
    assert solver.times.tolist() == [1.0, last, 0.0]
    drawn = solver.sample(gaussian_velocity(mean, std), x, fresh=lambda step: z if step == 0 else torch.full_like(z, math.nan))
    expected = x.clone()
    for t, after in ((1.0, last), (last, 0.0)):
        score = -(expected - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        v = gaussian_velocity(mean, std)(expected, torch.full((5,), t, dtype=torch.float64))
        expected = expected - (t - after) * (v - t * score) + (math.sqrt(2 * t * (t - after)) * z if after > 0 else 0.0)
    torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=1e-12)


def test_euler_maruyama_converges_in_law_at_first_order():
    """The state is linear in the starting noise and in every draw, so one row per draw gives its variance without sampling."""

    def std_error(steps):
        start = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
        start[0] = 1.0
        solver = EulerMaruyama(EulerMaruyamaConfig(steps=steps, last=1 / steps))
        draw = torch.eye(steps + 2, dtype=torch.float64)
        rows = solver.sample(gaussian_velocity(0.7, 0.4), start, fresh=lambda step: draw[step + 1].view(-1, 1, 1, 1)).flatten()
        mean = rows[-1]  # started at 0 and drew nothing
        assert mean.item() == pytest.approx(0.7, abs=1e-9)
        return abs((rows[:-1] - mean).square().sum().sqrt().item() - 0.4)

    errors = [std_error(steps) for steps in (64, 128, 256, 512)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 1e-3
    assert all(0.85 < order < 1.25 for order in orders), orders


@pytest.mark.parametrize(("name", "steps"), [("euler", 100), ("heun", 32), ("dpmpp_2m", 64), ("euler_maruyama", 250)])
def test_samples_of_a_bimodal_law_follow_it(name, steps):
    noise = torch.from_numpy(rng.normal(0, "start", range(64), (1, 8, 8)))
    x = sampler(name, steps=steps).sample(mixture_velocity, noise, fresh=fresh_of(noise)).double().numpy().ravel()

    def cdf(values):
        return (stats.norm.cdf(values, -1, 0.3) + stats.norm.cdf(values, 1, 0.3)) / 2

    assert stats.kstest(x, cdf).pvalue > 0.01
    if name == "euler_maruyama":  # the test can fail: the drift alone has another law
        still = sampler(name, steps=steps).sample(mixture_velocity, noise, fresh=lambda _: torch.zeros_like(noise))
        assert stats.kstest(still.double().numpy().ravel(), cdf).pvalue < 1e-6


def test_the_stochastic_sampler_repeats_itself_and_moves_with_its_draws():
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    solver = EulerMaruyama(EulerMaruyamaConfig(steps=10))
    draw = lambda seed: solver.sample(gaussian_velocity(0.0, 0.5), noise, fresh=fresh_of(noise, seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert (draw(0) - draw(1)).abs().max() > 0.1
    with pytest.raises(ValueError, match="euler_maruyama draws noise at every step"):
        solver.sample(gaussian_velocity(0.0, 0.5), noise)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "time_shift"), [(1, 1.0), (2, 3.0), (5, 0.2)])
def test_evaluations_are_counted_and_times_descend(name, steps, time_shift):
    asked = []

    def velocity(x, t):
        asked.append(t[0].item())
        return gaussian_velocity(0.0, 0.5)(x, t)

    solver = sampler(name, steps=steps, time_shift=time_shift)
    noise = torch.ones(2, 1, 1, 1)
    assert torch.isfinite(solver.sample(velocity, noise, fresh=fresh_of(noise))).all()
    assert len(asked) == solver.evaluations
    assert asked[0] == 1.0
    assert min(asked) > 0.0  # no sampler asks at t = 0
    assert solver.times[0] == 1.0
    assert solver.times[-1] == 0.0
    assert bool((solver.times.diff() < 0).all())


def test_heun_takes_two_evaluations_per_step_and_one_in_the_last():
    assert Heun(HeunConfig(steps=16)).evaluations == 31


def test_reference_times_of_euler_maruyama():
    """REPA: linspace(1, 0.04, steps), then 0."""
    times = EulerMaruyama(EulerMaruyamaConfig(steps=250)).times
    np.testing.assert_allclose(times.numpy(), [*np.linspace(1, 0.04, 250), 0.0], rtol=0, atol=1e-15)
    shifted = EulerMaruyama(EulerMaruyamaConfig(steps=9, time_shift=3.0)).times
    assert shifted[[0, -2, -1]].tolist() == [1.0, 0.04, 0.0]
    assert bool((shifted[1:-2] > torch.linspace(1, 0.04, 9, dtype=torch.float64)[1:-1]).all())


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_influence_each_other(name):
    noise = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    solver, fresh = sampler(name, steps=5), fresh_of(noise)
    together = solver.sample(gaussian_velocity(0.0, 0.5), noise, fresh=fresh)
    alone = [
        solver.sample(gaussian_velocity(0.0, 0.5), noise[i : i + 1], fresh=lambda step, i=i: fresh(step)[i : i + 1])
        for i in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_the_precision_of_the_noise(name):
    for dtype in (torch.float32, torch.float64):
        noise = torch.ones(1, 1, 1, 1, dtype=dtype)
        x = sampler(name, steps=3).sample(lambda x, t: torch.full_like(x, 0.5).bfloat16(), noise, fresh=fresh_of(noise))
        assert x.dtype == dtype


def test_the_state_keeps_its_precision_under_a_bf16_velocity():
    noise = torch.ones(1, 1, 1, 1)
    x = Euler(EulerConfig(steps=64)).sample(lambda x, t: torch.full_like(x, 0.001).bfloat16(), noise)
    assert x.dtype == torch.float32
    assert x.item() == pytest.approx(1 - float(torch.tensor(0.001).bfloat16()), abs=1e-6)


def test_time_grid():
    assert torch.equal(time_grid(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    shifted = time_grid(8, 3.0)
    assert shifted[0] == 1  # shift(a, 1) = 1
    assert shifted[-1] == 0
    assert shifted[1].item() == pytest.approx(0.954545, abs=1e-6)  # 3·0.875 / (1 + 2·0.875) = 21/22
    assert bool((shifted.diff() < 0).all())


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (EulerConfig(steps=0), "sampler.steps=0"),
        (EulerConfig(time_shift=0.0), "sampler.time_shift=0.0"),
        (HeunConfig(steps=-1), "sampler.steps=-1"),
        (Dpmpp2mConfig(time_shift=-3.0), "sampler.time_shift=-3.0"),
        (EulerConfig(base_tokens=0), "sampler.base_tokens=0"),
        (EulerMaruyamaConfig(last=0.0), "sampler.last=0.0: must lie between 0 and 1"),
        (EulerMaruyamaConfig(last=1.0), "sampler.last=1.0: must lie between 0 and 1"),
        (EulerMaruyamaConfig(steps=0), "sampler.steps=0"),
    ],
)
def test_impossible_settings_are_named(config, key):
    with pytest.raises(ConfigError, match=key):
        config.check(None)


@given(name=st.sampled_from(NAMES), steps=st.integers(1, 40), tokens=st.integers(1, 5000))
def test_invariant_7_time_shift_one_is_the_uniform_grid(name, steps, tokens):
    """Spec 14 (7), to the bit; and no image changes a grid that does not follow the resolution, nor one of base_tokens."""
    assert torch.equal(time_grid(steps, 1.0), torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    solver = sampler(name, steps=steps)
    assert solver.at(tokens) is solver
    same = sampler(name, steps=steps, resolution=Resolution.sqrt, base_tokens=tokens).at(tokens)
    assert torch.equal(same.times, solver.times)


@given(name=st.sampled_from(NAMES), a=st.floats(0.1, 10), side=st.integers(1, 64))
def test_the_resolution_multiplies_the_time_shift(name, a, side):
    """Shifts compose: time_shift a at base_tokens is a times the ratio of the sides elsewhere."""
    follows = sampler(name, steps=7, time_shift=a, resolution=Resolution.sqrt, base_tokens=64).at(side**2)
    torch.testing.assert_close(follows.times, sampler(name, steps=7, time_shift=a * side / 8).times, rtol=1e-12, atol=1e-15)
    assert bool((follows.times.diff() < 0).all())
