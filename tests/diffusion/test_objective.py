"""Losses in float64, and how a network's output becomes a velocity."""

import numpy as np
import pytest
import torch
from torch import nn

from hdm import rng
from hdm.config.axes import OBJECTIVE
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.diffusion.objective import ContrastiveConfig, CosineConfig, Space, VelocityConfig, XPredictionConfig
from hdm.diffusion.sampler import Heun, HeunConfig
from hdm.model import Architecture, build
from hdm.model.backbone import Backbone, Condition, Route, Tap, full_view

SHAPE = (3, 2, 4, 4)


class Scaled(Backbone):
    """Answers factor * x_t + offset * t, and remembers what it was asked."""

    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x, timestep, condition, *, route=None):
        self.asked = (x, timestep, condition, route)
        return self.factor * x + self.offset * timestep[:, None, None, None]


def draws():
    x = torch.from_numpy(rng.normal(0, "x", range(3), SHAPE[1:]))
    eps = torch.from_numpy(rng.normal(0, "eps", range(3), SHAPE[1:]))
    condition = Condition(text=torch.zeros(3, 1, 2), position=torch.zeros(3, 16, 2), aspect=torch.zeros(3))
    return x, eps, torch.tensor([0.0, 0.3, 1.0]), condition


def test_velocity_loss_in_float64():
    x, eps, t, condition = draws()
    model, route = Scaled(0.5, -0.2), Route(noise=torch.zeros(3, 16))
    loss = OBJECTIVE.build(VelocityConfig()).loss(model, x, noise=eps, timestep=t, condition=condition, route=route)
    X, E, T = (a.double().numpy() for a in (x, eps, t))
    for b in range(3):
        x_t = (1 - T[b]) * X[b] + T[b] * E[b]
        expected = np.mean((0.5 * x_t - 0.2 * T[b] - (E[b] - X[b])) ** 2)
        np.testing.assert_allclose(loss[b].item(), expected, rtol=1e-5)
    assert model.asked[2] is condition
    assert model.asked[3] is route


def test_the_path_starts_at_the_image_and_ends_in_noise():
    x, eps, t, condition = draws()
    model = Scaled(1.0, 0.0)
    OBJECTIVE.build(VelocityConfig()).loss(model, x, noise=eps, timestep=t, condition=condition, route=None)
    assert torch.equal(model.asked[0][0], x[0])
    assert torch.equal(model.asked[0][2], eps[2])


def test_low_precision_predictions_are_compared_in_fp32():
    x, eps, t, condition = draws()

    class Low(Scaled):
        def forward(self, x, timestep, condition, *, route=None):
            return super().forward(x, timestep, condition, route=route).bfloat16()

    loss = OBJECTIVE.build(VelocityConfig()).loss(Low(0.5, 0.0), x, noise=eps, timestep=t, condition=condition, route=None)
    assert loss.dtype == torch.float32


class Free(Backbone):
    """Answers a parameter, whatever it is asked."""

    def __init__(self, answer) -> None:
        nn.Module.__init__(self)
        self.answer = nn.Parameter(answer)

    def forward(self, x, timestep, condition, *, route=None):
        return self.answer


def losses(config, model, t=None):
    x, eps, default, condition = draws()
    t = default if t is None else t
    return OBJECTIVE.build(config).loss(model, x, noise=eps, timestep=t, condition=condition, route=None)


def answer(x, eps, t):
    """What Scaled(0.5, -0.2) answers on the path, float64."""
    x, eps, t = x.double().numpy(), eps.double().numpy(), t.double().numpy()[:, None, None, None]
    return 0.5 * ((1 - t) * x + t * eps) - 0.2 * t


def test_cosine_term_in_float64():
    x, eps, t, _ = draws()
    model = Scaled(0.5, -0.2)
    found = losses(CosineConfig(weight=0.7), model)
    v, target = answer(x, eps, t), (eps - x).double().numpy()
    cosine = (v * target).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(target, axis=1)
    expected = ((v - target) ** 2).mean((1, 2, 3)) + 0.7 * (1 - cosine).mean((1, 2))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert torch.equal(losses(CosineConfig(weight=0.0), model), losses(VelocityConfig(), model))


def test_contrastive_term_in_float64():
    x, eps, t, _ = draws()
    model = Scaled(0.5, -0.2)
    v, target = answer(x, eps, t), (eps - x).double().numpy()
    other = target[[1, 2, 0]]
    expected = ((v - target) ** 2).mean((1, 2, 3)) - 0.05 * ((v - other) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(losses(ContrastiveConfig(), model).numpy(), expected, rtol=1e-5)
    assert torch.equal(losses(ContrastiveConfig(weight=0.0), model), losses(VelocityConfig(), model))


def test_the_best_contrastive_prediction_leaves_the_other_sample():
    """Closed form: the minimum is at (v - weight v') / (1 - weight)."""
    x, eps, _, _ = draws()
    target, weight = eps - x, 0.3
    model = Free((target - weight * target.roll(-1, dims=0)) / (1 - weight))
    losses(ContrastiveConfig(weight=weight), model).sum().backward()
    assert model.answer.grad.abs().max() < 1e-6
    elsewhere = Free(target)
    losses(ContrastiveConfig(weight=weight), elsewhere).sum().backward()
    assert elsewhere.answer.grad.abs().max() > 1e-3


def test_a_batch_of_one_has_no_other_sample():
    x, eps, t, condition = draws()
    with pytest.raises(ValueError, match="batch of one"):
        OBJECTIVE.build(ContrastiveConfig()).loss(
            Scaled(1.0, 0.0), x[:1], noise=eps[:1], timestep=t[:1], condition=condition[:1], route=None
        )


def test_x_prediction_in_float64():
    x, eps, _, _ = draws()
    t = torch.tensor([0.02, 0.3, 1.0])
    error = ((answer(x, eps, t) - x.double().numpy()) ** 2).mean((1, 2, 3))
    model = Scaled(0.5, -0.2)
    np.testing.assert_allclose(losses(XPredictionConfig(space=Space.x), model, t).numpy(), error, rtol=1e-5)
    bounded = np.array([0.05, 0.3, 1.0])
    np.testing.assert_allclose(losses(XPredictionConfig(), model, t).numpy(), error / bounded**2, rtol=1e-5)


def test_above_the_bound_the_loss_of_x_prediction_is_the_velocity_error_of_its_velocity():
    x, eps, _, condition = draws()
    objective, model, t = OBJECTIVE.build(XPredictionConfig()), Scaled(0.5, -0.2), torch.tensor([0.06, 0.3, 1.0])
    given = {"noise": eps, "timestep": t, "condition": condition, "route": None}
    torch.testing.assert_close(objective.velocity_error(model, x, **given), objective.loss(model, x, **given), rtol=1e-4, atol=0)
    as_velocity = OBJECTIVE.build(VelocityConfig()).loss(objective.as_velocity(model), x, **given)
    assert torch.equal(objective.velocity_error(model, x, **given), as_velocity)


@pytest.mark.parametrize("name", [n for n in OBJECTIVE.names() if n != "x_prediction"])
def test_validation_asks_every_velocity_network_the_same(name):
    x, eps, t, condition = draws()
    objective, model = OBJECTIVE.build(OBJECTIVE.get(name).config()), Scaled(0.5, -0.2)
    error = objective.velocity_error(model, x, noise=eps, timestep=t, condition=condition, route=None)
    assert torch.equal(error, losses(VelocityConfig(), model))
    assert objective.as_velocity(model) is model


def test_a_denoiser_draws_what_its_velocity_draws():
    """E[x | x_t] of N(0.7, 0.4^2), read as a velocity, flows from N(0, 1) to that Gaussian (closed form)."""
    mean, std = 0.7, 0.4

    class Denoiser(Scaled):
        def forward(self, x, timestep, condition, *, route=None):
            t = timestep.view(-1, 1, 1, 1)
            return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)

    *_, condition = draws()
    noise = torch.linspace(-2, 2, 3).view(3, 1, 1, 1)
    network = OBJECTIVE.build(XPredictionConfig(t_min=1e-3)).as_velocity(Denoiser(0.0, 0.0))
    drawn = Heun(HeunConfig(steps=128)).sample(lambda x, t: network(x, t, condition), noise)
    torch.testing.assert_close(drawn, mean + std * noise, rtol=0, atol=2e-4)


SIZES = [
    "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1", "model.patch=2",
    "text_encoder=hash", "text_encoder.width=12", "autoencoder=pixel", "crop.size=16",
]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVE.names())
def test_gradients_of_every_objective_reach_every_parameter(name):
    """Routed and in bf16, on a real network; the same twice."""
    run = compose([*SIZES, f"objective={name}"])
    objective = OBJECTIVE.build(run.objective)

    def gradients():
        model = build(Architecture.of(run), seed=0)
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # away from gates that start at zero, behind which no gradient passes
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        x, eps = (torch.from_numpy(rng.normal(0, word, range(3), (3, 16, 16))) for word in ("x", "eps"))
        position = model.position_map(full_view(16, 16, batch=3), (8, 8))
        text = torch.from_numpy(rng.normal(0, "text", range(3), (4, 12)))
        route = Route(noise=torch.from_numpy(rng.uniform(0, "route", range(3), (64,))))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective.loss(
                model,
                x,
                noise=eps,
                timestep=torch.tensor([0.001, 0.5, 0.999]),
                condition=Condition(text=text, position=position, aspect=torch.tensor([-0.5, 0.3, 1.0])),
                route=route,
            )
        assert loss.shape == (3,)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    first, second = gradients(), gradients()
    for key, gradient in first.items():
        assert gradient is not None and torch.isfinite(gradient).all(), key
        assert gradient.abs().max() > 0, key
        assert torch.equal(gradient, second[key]), key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=x_prediction", "objective.t_min=0"], r"objective\.t_min=0\.0: must lie between 0 and 1"),
        (["objective=x_prediction", "objective.t_min=1"], r"objective\.t_min=1\.0: must lie"),
        (["objective=x_prediction", "objective.space=eps"], r"objective\.space=eps.*(v.*x|x.*v)"),
        (["objective=cosine", "objective.weight=-1"], r"objective\.weight=-1\.0: must be 0 or above"),
        (["objective=contrastive", "objective.weight=1"], r"objective\.weight=1\.0: must be at least 0 and below 1"),
        (["objective=contrastive", "train.batch_size=4", "train.accumulation=4"], "leaves one image per micro-batch"),
    ],
)
def test_impossible_objectives_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


class Tapped(Scaled):
    """Fills a tap with its input's first channel."""

    def forward(self, x, timestep, condition, *, route=None, tap=None):
        if tap is not None:
            tap.tokens = tap.depth * x[:, :1].flatten(1)[..., None]
        return super().forward(x, timestep, condition, route=route)


@pytest.mark.parametrize("name", OBJECTIVE.names())
def test_the_target_is_where_the_loss_is_least_and_taps_reach_the_network(name):
    """A network that answers the target has no error; objectives whose loss is an error have no loss. A tap changes no loss."""
    x, eps, _, condition = draws()
    t = torch.tensor([0.2, 0.5, 0.9])
    objective = OBJECTIVE.build(OBJECTIVE.get(name).config())
    target = objective.target(x, eps)
    assert torch.equal(target, x if name == "x_prediction" else eps - x)
    if name != "contrastive":
        loss = objective.compare(target, x, noise=eps, timestep=t)
        torch.testing.assert_close(loss, torch.zeros(3), rtol=0, atol=1e-6)
    given = {"noise": eps, "timestep": t, "condition": condition, "route": None}
    tap = Tap(depth=2)
    assert torch.equal(objective.loss(Tapped(0.5, 0.1), x, tap=tap, **given), objective.loss(Scaled(0.5, 0.1), x, **given))
    x_t = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * eps
    torch.testing.assert_close(tap.tokens, 2 * x_t[:, 0].flatten(1)[..., None])
    wrapped = Tap(depth=3)
    objective.as_velocity(Tapped(0.5, 0.1))(x_t, t, condition, tap=wrapped)
    torch.testing.assert_close(wrapped.tokens, 1.5 * tap.tokens)


def test_jits_loss_in_its_own_time():
    """JiT: z = t x + (1 - t) e, v = (x - z) / max(1 - t, 0.05) of the image and of the prediction, mean squared difference."""
    x, eps, t, _ = draws()
    found = losses(XPredictionConfig(), Scaled(0.5, -0.2))
    predicted, image, noise, ours = answer(x, eps, t), x.double().numpy(), eps.double().numpy(), t.double().numpy()
    for b in range(3):
        s = 1 - ours[b]
        z = s * image[b] + (1 - s) * noise[b]
        v, v_predicted = ((y - z) / max(1 - s, 0.05) for y in (image[b], predicted[b]))
        np.testing.assert_allclose(found[b].item(), np.mean((v_predicted - v) ** 2), rtol=1e-5)
