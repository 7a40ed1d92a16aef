import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import expit

from hdm import rng
from hdm.config.axes import TIMESTEP
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import Resolution
from hdm.diffusion.timestep import (
    CosmapConfig,
    EdmConfig,
    Law,
    LogitNormalConfig,
    ModeConfig,
    ShiftedConfig,
    UniformConfig,
    resolution_shift,
    shift,
    stratified,
)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 1.2), (0.8, 0.5)])
def test_logit_normal_is_the_inverse_of_scipys_cdf(mean, std):
    u = torch.linspace(0.001, 0.999, 500)
    t = TIMESTEP.build(LogitNormalConfig(mean=mean, std=std)).from_uniform(u)
    np.testing.assert_allclose(t.numpy(), expit(mean + std * stats.norm.ppf(u.double().numpy())), rtol=1e-6)


def test_tails_are_exact_and_the_ends_finite():
    law = TIMESTEP.build(LogitNormalConfig())
    u = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24])
    t = law.from_uniform(u)
    assert t[0] == 0.0
    np.testing.assert_allclose(t[1:].numpy(), expit(stats.norm.ppf([2.0**-24, 1 - 2.0**-24])), rtol=1e-6)


def test_draws_follow_the_law():
    u = torch.from_numpy(rng.uniform(0, "timestep", range(2000)))
    t = TIMESTEP.build(LogitNormalConfig(mean=0.3, std=0.7)).from_uniform(u).double().numpy()
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.3, 0.7).cdf).pvalue > 0.01


def test_uniform_is_the_identity():
    u = torch.linspace(0, 0.99, 7)
    assert torch.equal(TIMESTEP.build(UniformConfig()).from_uniform(u), u)


@pytest.mark.parametrize("name", TIMESTEP.names())
def test_every_law_is_an_increasing_map_onto_the_unit_interval(name):
    law = TIMESTEP.build(TIMESTEP.get(name).config())
    t = law.from_uniform(torch.linspace(0, 1, 1001)[:-1], tokens=1024)
    assert t.dtype == torch.float32
    assert t[0] == 0.0
    assert bool((t.diff() > 0).all())
    assert 0.9 < t[-1] < 1.0
    ends = law.from_uniform(torch.tensor([2.0**-24, 1 - 2.0**-24]), tokens=1024)
    assert bool(((ends > 0) & (ends <= 1)).all())


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.6, 1.2), (-0.4, 1.0)])
def test_edm_is_logit_normal(mean, std):
    """sigma / (1 + sigma) with log sigma ~ N(mean, std): scipy's lognormal, and our logit-normal."""
    u = torch.linspace(0.001, 0.999, 500)
    t = TIMESTEP.build(EdmConfig(p_mean=mean, p_std=std)).from_uniform(u)
    sigma = stats.lognorm.ppf(u.double().numpy(), s=std, scale=np.exp(mean))
    np.testing.assert_allclose(t.numpy(), sigma / (1 + sigma), rtol=1e-6)
    torch.testing.assert_close(t, TIMESTEP.build(LogitNormalConfig(mean=mean, std=std)).from_uniform(u), rtol=1e-6, atol=0)


def test_edm_bears_any_width():
    t = TIMESTEP.build(EdmConfig(p_std=500.0)).from_uniform(torch.tensor([0.0, 1e-4, 0.5, 0.9999]))
    assert t.tolist()[:2] == [0.0, 0.0]
    assert t[3] == 1.0


@pytest.mark.parametrize("a", [0.3, 1.0, 3.0])
def test_shifting_a_logit_normal_moves_its_mean_by_log_a(a):
    u = torch.linspace(0.001, 0.999, 500)
    shifted = TIMESTEP.build(ShiftedConfig(mean=0.2, std=0.9, shift=a)).from_uniform(u)
    np.testing.assert_allclose(shifted.numpy(), expit(0.2 + np.log(a) + 0.9 * stats.norm.ppf(u.double().numpy())), rtol=2e-6)


def test_the_shift_follows_the_resolution():
    """a = sqrt(tokens / base_tokens): 1024 px has 16 times the tokens of 256 px, a = 4."""
    u = torch.linspace(0, 0.999, 50)
    law = TIMESTEP.build(ShiftedConfig(law=Law.uniform))
    assert torch.equal(law.from_uniform(u, tokens=256), u)
    expected = 4 * u.double() / (1 + 3 * u.double())
    torch.testing.assert_close(law.from_uniform(u, tokens=4096), expected.float(), rtol=1e-6, atol=0)
    fixed = TIMESTEP.build(ShiftedConfig(law=Law.uniform, shift=4.0))
    assert torch.equal(fixed.from_uniform(u, tokens=17), law.from_uniform(u, tokens=4096))
    with pytest.raises(ValueError, match="number of image tokens"):
        law.from_uniform(u)


def test_the_ends_stay_and_shifts_compose():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for a in (0.2, 1.0, 3.0):
        assert shift(t, a)[[0, -1]].tolist() == [0.0, 1.0]
    torch.testing.assert_close(shift(shift(t, 3.0), 0.5), shift(t, 1.5), rtol=1e-14, atol=0)


def test_cosmap_has_the_density_of_the_paper():
    """The CDF is the integral of 2 / (pi (1 - 2 t + 2 t^2)), by quadrature."""
    u = torch.tensor([0.01, 0.2, 0.5, 0.77, 0.999])
    t = TIMESTEP.build(CosmapConfig()).from_uniform(u).double().numpy()
    mass = [integrate.quad(lambda t: 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2), 0, end)[0] for end in t]
    np.testing.assert_allclose(mass, u.double().numpy(), rtol=1e-6)


def test_mode_is_uniform_at_zero_and_symmetric_otherwise():
    u = torch.linspace(0, 0.99, 100)
    assert torch.equal(TIMESTEP.build(ModeConfig(scale=0.0)).from_uniform(u), u)
    law = TIMESTEP.build(ModeConfig())
    torch.testing.assert_close(law.from_uniform(u[1:]) + law.from_uniform(1 - u[1:]), torch.ones(99), rtol=0, atol=1e-6)
    middle = law.from_uniform(torch.tensor([0.25, 0.75])).diff().item()
    assert middle < 0.5 - 0.1  # half of the draws fall into less than half of the range: heavier in the middle


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["timestep.std=0.0"], r"timestep\.std=0\.0: must be above 0"),
        (["timestep=edm", "timestep.p_std=-1"], r"timestep\.p_std=-1\.0: must be above 0"),
        (["timestep=shifted", "timestep.shift=0"], r"timestep\.shift=0\.0: must be above 0"),
        (["timestep=shifted", "timestep.std=0"], r"timestep\.std=0\.0: must be above 0"),
        (["timestep=shifted", "timestep.base_tokens=0"], r"timestep\.base_tokens=0: must be above 0"),
        (["timestep=shifted", "timestep.resolution=fixed"], r"timestep\.resolution=fixed: needs timestep\.shift"),
        (["timestep=edm", "timestep.sigma_data=0"], r"timestep\.sigma_data=0\.0: must be above 0"),
        (["timestep=mode", "timestep.scale=1.8"], r"timestep\.scale=1\.8: must be from -1 to 2 / \(pi - 2\)"),
        (["timestep=mode", "timestep.scale=-1.1"], r"timestep\.scale=-1\.1: must be from -1"),
    ],
)
def test_a_law_that_is_none_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


@pytest.mark.parametrize("scale", [-1.0, 2 / (np.pi - 2)])
def test_mode_increases_up_to_its_limits(scale):
    t = TIMESTEP.build(ModeConfig(scale=scale)).from_uniform(torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1])
    assert bool((t.double().diff() >= 0).all())


def test_repas_log_normal_law_is_logit_normal():
    """sigma log-normal(0, 1), t = sigma / (1 + sigma): scipy's law against ours with mean 0, std 1."""
    u = torch.linspace(0.001, 0.999, 500)
    sigma = stats.lognorm.ppf(u.double().numpy(), s=1.0)
    for config in (LogitNormalConfig(), EdmConfig(p_mean=0.0, p_std=1.0)):
        np.testing.assert_allclose(TIMESTEP.build(config).from_uniform(u).numpy(), sigma / (1 + sigma), rtol=1e-6)


@pytest.mark.parametrize(("mean", "std", "data"), [(-1.2, 1.2, 0.5), (-0.4, 1.0, 0.5), (0.0, 0.6, 1.0)])
def test_sigma_data_keeps_the_signal_to_noise_ratio(mean, std, data):
    """EDM sees data of std sigma_data under noise of std sigma; x_t has data of std 1 times 1 - t under noise of std t."""
    u = torch.linspace(0.001, 0.999, 500)
    t = TIMESTEP.build(EdmConfig(p_mean=mean, p_std=std, sigma_data=data)).from_uniform(u).double().numpy()
    sigma = np.exp(stats.norm.ppf(u.double().numpy()) * std + mean)
    np.testing.assert_allclose((1 - t) / t, data / sigma, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "a"), [(256, 1.65), (1024, 1.88), (2304, 2.33), (4096, 3.16)])
def test_flux_shift_at_the_published_resolutions(tokens, a):
    """Spec 11, measured on the public pipeline. `test_parity.py` holds the grids to diffusers."""
    found = resolution_shift(Resolution.flux, tokens, base_tokens=1)
    assert found == pytest.approx(a, abs=0.005)
    assert math.log(resolution_shift(Resolution.flux, 256, base_tokens=1)) == pytest.approx(0.5, abs=1e-15)
    assert math.log(resolution_shift(Resolution.flux, 4096, base_tokens=1)) == pytest.approx(1.15, abs=1e-15)
    u = torch.linspace(0, 0.999, 50)
    law = TIMESTEP.build(ShiftedConfig(law=Law.uniform, resolution=Resolution.flux))
    torch.testing.assert_close(law.from_uniform(u, tokens=tokens), shift(u.double(), found).float(), rtol=1e-6, atol=0)


def test_sd3_shift_is_the_ratio_of_the_sides():
    for side in (16, 32, 64, 96):
        assert resolution_shift(Resolution.sqrt, side**2, base_tokens=256) == side / 16
    assert resolution_shift(Resolution.fixed, 4096, base_tokens=256) == 1.0


times = st.floats(0, 1)
shifts = st.floats(0.05, 20)


@given(t=times)
def test_invariant_7_shift_by_one_is_the_identity(t):
    """Spec 14 (7), to the bit, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(t, dtype=dtype)
        assert torch.equal(shift(value, 1.0), value)
    u = torch.tensor([min(t, 1 - 2**-24)], dtype=torch.float32)
    plain, same = (TIMESTEP.build(c) for c in (UniformConfig(), ShiftedConfig(law=Law.uniform, shift=1.0)))
    assert torch.equal(same.from_uniform(u), plain.from_uniform(u))


@given(t=times, a=shifts, b=shifts)
def test_shifts_form_a_group_on_the_unit_interval(t, a, b):
    value = torch.tensor(t, dtype=torch.float64)
    moved = shift(value, a)
    assert 0 <= moved <= 1
    assert (moved >= value) if a >= 1 else (moved <= value + 1e-15)
    torch.testing.assert_close(shift(moved, b), shift(value, a * b), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shift(moved, 1 / a), value, rtol=1e-12, atol=1e-15)


@given(seed=st.integers(0, 9), strata=st.integers(1, 40), group=st.integers(0, 1000))
def test_every_global_batch_has_one_draw_in_every_stratum(seed, strata, group):
    draws = stratified(seed, range(group * strata, (group + 1) * strata), strata)
    assert draws.dtype == np.float32
    assert ((draws >= 0) & (draws < 1)).all()
    middle = (np.sort(draws.astype(float)) * strata - np.arange(strata) - 0.5) / 0.5
    assert (np.abs(middle) <= 1 + 1e-4).all()  # within its part, up to the rounding of float32


@given(strata=st.integers(1, 40), start=st.integers(0, 500), length=st.integers(1, 60), cut=st.integers(0, 60))
def test_stratified_draws_are_keyed_by_sample(strata, start, length, cut):
    """However the samples are split into batches, and wherever a run resumes."""
    index = list(range(start, start + length))
    parts = [stratified(3, part, strata) for part in (index[:cut], index[cut:]) if part]
    np.testing.assert_array_equal(np.concatenate(parts), stratified(3, index, strata))


def test_stratified_draws_are_uniform_and_in_no_order():
    """One sample of each batch, over many batches: its part and its place in it are drawn anew."""
    first = np.concatenate([stratified(0, [16 * group], 16) for group in range(2000)])
    assert stats.kstest(first, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    whole = stratified(0, range(1600), 16).reshape(100, 16)
    independent = rng.uniform(0, "timestep", range(1600)).reshape(100, 16)
    assert whole.mean(1).std() < 0.2 * independent.mean(1).std()  # what it is for: batches of equal mean; 1 / 16 of it in theory


@pytest.mark.parametrize("name", TIMESTEP.names())
def test_every_law_draws_both_ways(name):
    config = TIMESTEP.get(name).config
    plain, even = (TIMESTEP.build(config(stratified=choice)) for choice in (False, True))
    np.testing.assert_array_equal(plain.quantiles(4, [7, 8], batch_size=8), rng.uniform(4, "timestep", [7, 8]))
    np.testing.assert_array_equal(even.quantiles(4, [7, 8], batch_size=8), stratified(4, [7, 8], 8))
