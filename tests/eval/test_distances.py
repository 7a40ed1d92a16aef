"""The distances against scipy, torch-fidelity, torchmetrics and closed forms; no network runs here."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import confidence, manifold
from eval.frechet import Gaussian, Moments, frechet
from eval.kernel import gaussian, mmd, mmd_error, polynomial
from hdm import torchvision_cpu

torchvision_cpu.declare()


def correlated(n, d, *, seed=0, shift=0.0):
    """Samples with eigenvalues over some orders of magnitude, as features have."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) * np.logspace(0, -2, d)
    return draw.standard_normal((n, d)) @ mix + shift


def by_square_root(x, y):
    """The definition, through scipy's matrix square root."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)


def distance(x, y):
    return frechet(Gaussian.of_features(x), Gaussian.of_features(y))


# --- Fréchet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 40, 200])
def test_frechet_equals_the_matrix_square_root(d):
    x, y = correlated(3 * d + 10, d), correlated(4 * d, d, seed=1, shift=0.1)
    assert distance(x, y) == pytest.approx(by_square_root(x, y), rel=1e-8)


def test_frechet_equals_clean_fid():
    from cleanfid.fid import frechet_distance

    x, y = correlated(400, 60), correlated(300, 60, seed=1, shift=0.2)
    theirs = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert distance(x, y) == pytest.approx(float(theirs), rel=1e-8)


def test_frechet_equals_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = correlated(400, 60), correlated(300, 60, seed=1, shift=0.2)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(x)), fid_features_to_statistics(torch.from_numpy(y)), False
    )
    assert distance(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(20, 300), (300, 20), (20, 25)])
def test_fewer_samples_than_features_take_the_gram_matrix_and_agree(n, m):
    x, y = correlated(n, 50), correlated(m, 50, seed=1, shift=0.3)
    through_moments = frechet(Gaussian.of_moments(Moments.of([x])), Gaussian.of_moments(Moments.of([y])))
    assert distance(x, y) == pytest.approx(through_moments, rel=1e-6)  # the covariances are singular: half the digits


def test_frechet_of_axis_aligned_gaussians_is_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    first = Gaussian(np.zeros(3), np.diag(np.sqrt(a)), square=True)
    second = Gaussian(np.array([1.0, 2.0, -2.0]), np.diag(np.sqrt(b)), square=True)
    assert frechet(first, second) == pytest.approx(9 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_frechet_is_symmetric_and_does_not_see_rotations(d, seed):
    x, y = correlated(5 * d, d, seed=seed), correlated(6 * d, d, seed=seed + 1, shift=0.5)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)
    assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y), rel=1e-8)
    assert distance(x, x) == pytest.approx(0, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_moments_do_not_depend_on_the_parts(sizes, seed):
    sizes = [2, *sizes]
    x = np.random.default_rng(seed).standard_normal((sum(sizes), 4)) + 1000  # cancellation would show
    moments = Moments.of(np.split(x, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_fid_is_biased_upwards_at_small_n_and_kid_is_not():
    """Two sets of one kind: the expected FID falls with n towards 0; the mean of KID is within its standard error of 0."""
    fid = {n: np.mean([distance(correlated(n, 30, seed=s), correlated(n, 30, seed=s + 500)) for s in range(20)]) for n in (40, 400)}
    assert fid[40] > 5 * fid[400] > 0
    kid = [mmd(correlated(40, 30, seed=s), correlated(40, 30, seed=s + 500), polynomial) for s in range(200)]
    assert abs(np.mean(kid)) < 3 * np.std(kid) / np.sqrt(len(kid))
    assert min(kid) < 0 < max(kid)


# --- kernels ----------------------------------------------------------------------------------------------------------


def slow_mmd(x, y, kernel, *, biased):
    n, m = len(x), len(y)
    pairs = lambda a, b: sum(kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if biased or a is not b or i != j)  # noqa: E731
    within = (lambda k: k * k) if biased else (lambda k: k * (k - 1))
    return pairs(x, x) / within(n) + pairs(y, y) / within(m) - 2 * pairs(x, y) / (n * m)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["polynomial", "gaussian"])
def test_mmd_equals_the_sum_over_pairs(kind, biased):
    x, y = correlated(13, 5), correlated(9, 5, seed=1, shift=0.4)
    kernels = {
        "polynomial": (polynomial, lambda p, q: (p @ q / 5 + 1) ** 3),
        "gaussian": (gaussian(1.5), lambda p, q: np.exp(-((p - q) ** 2).sum() / (2 * 1.5**2))),
    }
    fast, slow = kernels[kind]
    assert mmd(x, y, fast, biased=biased) == pytest.approx(slow_mmd(x, y, slow, biased=biased), rel=1e-12)


def test_mmd_in_blocks_is_mmd_at_once(monkeypatch):
    x, y = correlated(50, 6), correlated(40, 6, seed=1)
    whole = mmd(x, y, polynomial)
    monkeypatch.setattr("eval.kernel._BLOCK", 7)
    assert mmd(x, y, polynomial) == pytest.approx(whole, rel=1e-12)


def test_kid_equals_torch_fidelity_and_torchmetrics():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    x, y = correlated(80, 20), correlated(80, 20, seed=1, shift=0.2)
    own = mmd(x, y, polynomial)
    fidelity = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subsets=1, kid_subset_size=80, verbose=False)
    assert own == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-10)
    assert own == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-10)


def test_the_error_of_kid_is_its_spread_over_new_draws():
    def new(seed, shift=0.3):
        return np.random.default_rng(seed).standard_normal((200, 10)) + shift

    y = new(1000, 0.0)
    spread = np.std([mmd(new(s), y, polynomial) for s in range(200)])
    errors = [mmd_error(new(s), y, polynomial, confidence.weights(200, 200)) for s in range(8)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)


# --- manifolds --------------------------------------------------------------------------------------------------------


def test_prdc_equals_its_definition_pair_by_pair():
    real, fake, k = correlated(40, 4), correlated(30, 4, seed=1, shift=0.4), 3

    def reach(points):
        return [sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if i != j)[k - 1] for i, p in enumerate(points)]

    of_real, of_fake = reach(real), reach(fake)
    inside = np.array([[np.linalg.norm(f - r) <= of_real[j] for j, r in enumerate(real)] for f in fake])
    reached = np.array([[np.linalg.norm(f - r) <= of_fake[i] for i, f in enumerate(fake)] for r in real])
    found = manifold.prdc(fake, real, k=k)
    assert found["precision"] == pytest.approx(inside.any(1).mean())
    assert found["recall"] == pytest.approx(reached.any(1).mean())
    assert found["density"] == pytest.approx(inside.sum() / (k * len(fake)))
    assert found["coverage"] == pytest.approx(inside.any(0).mean())


def test_prdc_equals_that_of_its_authors():
    from prdc import compute_prdc

    real, fake = correlated(300, 16), correlated(200, 16, seed=1, shift=0.4)
    assert manifold.prdc(fake, real, k=5) == pytest.approx(compute_prdc(real, fake, nearest_k=5))


def test_density_and_coverage_of_one_kind_have_their_expectations():
    """Naeem et al. (2020), section 3.3: density 1, coverage 1 - (1/2)^k for many samples of one law."""
    found = manifold.prdc(correlated(1500, 3), correlated(1500, 3, seed=1), k=5)
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["coverage"] == pytest.approx(1 - 0.5**5, abs=0.02)


def test_mode_drop_costs_recall_and_noise_costs_precision():
    real = np.concatenate([correlated(100, 4), correlated(100, 4, seed=1, shift=5.0)])
    same = np.concatenate([correlated(100, 4, seed=2), correlated(100, 4, seed=3, shift=5.0)])
    whole = manifold.prdc(same, real)
    dropped = manifold.prdc(np.concatenate([same[:100], correlated(100, 4, seed=4)]), real)
    assert dropped["recall"] < 0.7 * whole["recall"]
    assert dropped["coverage"] < 0.7 * whole["coverage"]
    assert dropped["precision"] > 0.9 * whole["precision"]
    wide = manifold.prdc(same + 3 * np.random.default_rng(0).standard_normal(same.shape), real)
    assert wide["precision"] < 0.5 * whole["precision"]


def test_errors_of_prdc_shrink_with_the_number_of_images():
    real = correlated(200, 4)
    small, large = (manifold.prdc_errors(correlated(n, 4, seed=1), real, confidence.weights(n, 200)) for n in (50, 800))
    assert small["precision"] == pytest.approx(4 * large["precision"], rel=0.6)  # as 1 / sqrt(n)


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def test_bootstrap_error_of_a_mean_is_the_standard_error():
    values = np.random.default_rng(0).standard_normal(400)
    drawn = confidence.weights(400, 2000)
    assert (drawn.sum(axis=1) == 400).all()
    standard = values.std() / np.sqrt(400)
    assert confidence.error_of_mean(values, drawn) == pytest.approx(standard, rel=0.1)
    assert confidence.error_of(lambda rows: values[rows].mean(), drawn[:500]) == pytest.approx(standard, rel=0.15)
    assert np.array_equal(confidence.weights(50, 3), confidence.weights(50, 3))
