"""Samplers, timestep laws and CFG-Zero* against diffusers, an implementation that is not ours.

Each test states the largest relative error |ours - theirs| / max|theirs| that it allows. diffusers computes in fp32. The samplers
are also held to their published steps, written again in float64. `python -m benchmarks.parity` prints what is measured.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from hdm import torchvision_cpu

torchvision_cpu.declare()

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler  # noqa: E402
from diffusers.guiders import ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance  # noqa: E402
from diffusers.training_utils import compute_density_for_timestep_sampling  # noqa: E402
from scipy import stats  # noqa: E402

from hdm.config.axes import SAMPLER  # noqa: E402
from hdm.config.schema import Resolution  # noqa: E402
from hdm.diffusion.guidance import Cfg, CfgConfig, CfgZeroStar, CfgZeroStarConfig, Interval, IntervalConfig  # noqa: E402
from hdm.diffusion.sampler import Dpmpp2m, Dpmpp2mConfig, Euler, EulerConfig, Heun, HeunConfig, time_grid  # noqa: E402
from hdm.diffusion.timestep import LogitNormal, LogitNormalConfig, Mode, ModeConfig  # noqa: E402
from hdm.model.backbone import Backbone, Condition  # noqa: E402

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS = 12


def velocity(x, t):
    """A smooth field without symmetry."""
    t = t.view(-1, 1, 1, 1)
    return torch.sin(2 * x + 3 * t) + 0.3 * x.roll(1, dims=3) - 0.5 * t * x


def theirs(scheduler, evaluations):
    """Their loop over their own times; timesteps are 1000 times ours."""
    x = NOISE
    for i in range(evaluations):
        t = scheduler.timesteps[i]
        sigma = scheduler.sigmas[scheduler.step_index if scheduler.step_index is not None else 0]
        x = scheduler.step(velocity(x, sigma.expand(2)), t, x, return_dict=False)[0]
    return x


def agree(ours, reference, allowed):
    """Within `allowed` of the largest value of the reference."""
    bound = allowed * reference.abs().max().item()
    torch.testing.assert_close(ours, reference, rtol=0, atol=bound, check_dtype=False)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parity("`sampler=euler`", "diffusers FlowMatchEulerDiscreteScheduler, float32")
def test_euler(shift):
    """5e-6. `sigmas` makes diffusers use the plain formula, once."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    ours = Euler(EulerConfig(steps=STEPS, time_shift=shift))
    np.testing.assert_allclose(ours.times.numpy(), scheduler.sigmas.numpy(), rtol=1e-6)
    agree(ours.sample(velocity, NOISE), theirs(scheduler, STEPS), 5e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parity("`sampler=heun`", "diffusers FlowMatchHeunDiscreteScheduler, float32")
def test_heun(shift):
    """5e-6, on diffusers' own times, which end at 1/1000 and 0."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    ours = Heun(HeunConfig(steps=STEPS))
    ours.times = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]]).double()
    assert len(ours.times) == STEPS + 1
    x = NOISE
    for i in range(ours.evaluations):
        stage = scheduler.timesteps[i] / 1000
        x = scheduler.step(velocity(x, stage.expand(2)), scheduler.timesteps[i], x, return_dict=False)[0]
    agree(ours.sample(velocity, NOISE), x, 5e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("from_noise", [False, True])
@pytest.mark.parity("`sampler=dpmpp_2m`", "diffusers DPMSolverMultistepScheduler, float32")
def test_dpmpp_2m(shift, from_noise):
    """1e-5, on diffusers' times, which begin at 0.999, and on ours, which begin at 1 where lambda is infinite."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(STEPS)
    ours = Dpmpp2m(Dpmpp2mConfig(steps=STEPS, time_shift=shift))
    if from_noise:
        scheduler.sigmas = ours.times.float()
    else:
        assert scheduler.sigmas[0] < 1
        ours.times = scheduler.sigmas.double()
    agree(ours.sample(velocity, NOISE), theirs(scheduler, STEPS), 1e-5)


@pytest.mark.parametrize("tokens", [256, 1024, 2304, 4096])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parity("times by resolution, `flux` and `sqrt`", "diffusers FlowMatchEulerDiscreteScheduler, float32")
def test_flux_grid(name, tokens):
    """1e-6: every sampler's times, against diffusers' dynamic shift by mu."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.5 + 0.65 * (tokens - 256) / 3840)
    ours = SAMPLER.build(SAMPLER.get(name).config(steps=STEPS, resolution=Resolution.flux)).at(tokens)
    agree(ours.times, scheduler.sigmas.double(), 1e-6)
    static = FlowMatchEulerDiscreteScheduler(shift=math.sqrt(tokens / 1024))
    static.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    ours = SAMPLER.build(SAMPLER.get(name).config(steps=STEPS, resolution=Resolution.sqrt, base_tokens=1024)).at(tokens)
    agree(ours.times, static.sigmas.double(), 1e-6)


def test_diffusers_own_grid_is_shifted_twice():
    """Spec 11: shift 3, 8 steps: .9475 and at the end .00893 where the formula has .9545 and .3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    assert scheduler.sigmas[1].item() == pytest.approx(0.9475, abs=5e-5)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.00893, abs=5e-6)
    once = time_grid(8, 3.0)
    assert once[1].item() == pytest.approx(21 / 22, rel=1e-12)
    assert once[-2].item() == pytest.approx(0.3, rel=1e-12)


def at(x, t):
    return velocity(torch.from_numpy(x), torch.full((2,), t, dtype=torch.float64)).numpy()


def published_euler(x, times, fresh):
    for t, after in pairwise(times):
        x = x + (after - t) * at(x, t)
    return x


def published_heun(x, times, fresh):
    """EDM, algorithm 1: d and d' averaged, unless the next time is 0."""
    for t, after in pairwise(times):
        d = at(x, t)
        euler = x + (after - t) * d
        x = euler if after == 0 else x + (after - t) * (0.5 * d + 0.5 * at(euler, after))
    return x


def published_dpmpp_2m(x, times, fresh):
    """DPM-Solver++, algorithm 2: sigma'/sigma x - alpha' (e^-h - 1) ((1 + 1/2r) x0 - 1/2r x0_before), r = h_before / h."""
    lam = [math.inf if t == 0 else -math.inf if t == 1 else math.log1p(-t) - math.log(t) for t in times]
    image, before = None, None
    for i, (t, after) in enumerate(pairwise(times)):
        before, image = image, x - t * at(x, t)
        h = lam[i + 1] - lam[i]
        mixed = image
        if i > 0 and after > 0 and math.isfinite(lam[i - 1]):
            r = (lam[i] - lam[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * before
        x = (after / t) * x - (1 - after) * math.expm1(-h) * mixed if math.isfinite(h) else first_order(x, t, after, mixed)
    return x


def first_order(x, t, after, image):
    """The limit of the step where lambda is infinite: the straight line through x and the image."""
    return image + (after / t) * (x - image)


def published_euler_maruyama(x, times, fresh):
    """SiT and REPA: dt < 0, diffusion w = 2 t, d = v - w/2 score, noise sqrt(w |dt|), the last step its mean.

    The score by SiT's general formula, (alpha v / alpha' - x) / (sigma^2 - alpha sigma sigma' / alpha').
    """
    for i, (t, after) in enumerate(pairwise(times)):
        alpha, d_alpha, sigma, d_sigma = 1 - t, -1.0, t, 1.0
        v, dt, w = at(x, t), after - t, 2 * t
        score = (alpha / d_alpha * v - x) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
        x = x + dt * (v - w / 2 * score)
        if after > 0:
            x = x + math.sqrt(w) * fresh(i).numpy() * math.sqrt(-dt)
    return x


PUBLISHED = {
    "euler": published_euler,
    "heun": published_heun,
    "dpmpp_2m": published_dpmpp_2m,
    "euler_maruyama": published_euler_maruyama,
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", SAMPLER.names())
@pytest.mark.parity("`sampler={name}`, {dtype}", "published steps in numpy, float64")
def test_published_steps(name, dtype, allowed, shift):
    """1e-12 in float64 and 1e-5 in float32, on the grid of the sampler."""
    ours = SAMPLER.build(SAMPLER.get(name).config(steps=STEPS, time_shift=shift))
    draws = torch.randn(STEPS, *NOISE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(PUBLISHED[name](NOISE.double().numpy(), ours.times.tolist(), draws.__getitem__))
    agree(ours.sample(velocity, NOISE.to(dtype), fresh=draws.__getitem__), expected, allowed)


def test_guiding_the_drift_is_guiding_the_velocity():
    """REPA guides d = v - t score of the SDE, we guide v: d is affine in v, and the weights w and 1 - w sum to 1."""
    c, u = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    x, t, w = NOISE.double(), 0.37, 1.8

    def drift(v):
        return v + (x + (1 - t) * v)

    torch.testing.assert_close(drift(u + w * (c - u)), drift(u) + w * (drift(c) - drift(u)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.29, 0.5, -0.9])
@pytest.mark.parity("`timestep=mode`", "diffusers compute_density_for_timestep_sampling, float32")
def test_mode_law(scale):
    """1e-6 (of 1): SD3's formula falls with u, so its draw u is our quantile 1 - u."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    reference = compute_density_for_timestep_sampling("mode", 1000, mode_scale=scale, generator=torch.Generator().manual_seed(3))
    ours = Mode(ModeConfig(scale=scale)).from_uniform(1 - u.double())
    np.testing.assert_allclose(ours.numpy(), reference.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parity("`timestep=logit_normal`", "diffusers compute_density_for_timestep_sampling, float32")
def test_logit_normal_law():
    """1e-5 (of 1), through the quantile of their normal draw."""
    mean, std = -0.6, 1.2
    z = torch.normal(mean=mean, std=std, size=(1000,), generator=torch.Generator().manual_seed(3))
    reference = compute_density_for_timestep_sampling(
        "logit_normal", 1000, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(3)
    )
    u = torch.from_numpy(stats.norm.cdf((z.double().numpy() - mean) / std))
    np.testing.assert_allclose(
        LogitNormal(LogitNormalConfig(mean=mean, std=std)).from_uniform(u).numpy(), reference.numpy(), rtol=0, atol=1e-5
    )


class Shifted(Backbone):
    """The field above, shifted by the mean of the text: two captions, two velocities."""

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, x, timestep, condition, *, route=None):
        return velocity(x + condition.text.mean((1, 2)).view(-1, 1, 1, 1), timestep)


def caption(value):
    return Condition(text=torch.full((2, 1, 3), value), position=torch.zeros(2, 4, 2), aspect=torch.zeros(2))


CONDITION, NULL = caption(0.7), caption(-0.4)


@pytest.mark.parametrize(
    ("reference", "ours"),
    [
        (ClassifierFreeGuidance(guidance_scale=3.0), Cfg(CfgConfig(scale=3.0))),
        (
            ClassifierFreeGuidance(guidance_scale=2.5, start=0.25, stop=0.75),  # steps 2 to 5 of 8
            Interval(IntervalConfig(scale=2.5, low=0.375, high=0.75)),
        ),
        (
            ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=2),
            CfgZeroStar(CfgZeroStarConfig(scale=3.0, zero=0.25)),
        ),
    ],
    ids=["cfg", "interval", "cfg_zero_star"],
)
@pytest.mark.parity("`guidance=cfg`, `interval`, `cfg_zero_star`", "diffusers guiders, float32")
def test_guidance_along_eight_steps(reference, ours):
    """1e-5: the same velocity at every step of a uniform grid, by their count of steps and our count of time."""
    model = Shifted()
    for step in range(8):
        t = torch.full((2,), 1 - step / 8)
        reference.set_state(step=step, num_inference_steps=8, timestep=1000 * t[:1])
        expected = reference.forward(model(NOISE, t, CONDITION), model(NOISE, t, NULL)).pred
        found = ours.velocity(model, NOISE, t, CONDITION, NULL, route_noise=None)
        agree(found, expected, 1e-5)
