"""The loss of a pass that removes patches (routing=deferred_mask and mask_mae), against the same sums written out in numpy."""

import numpy as np
import pytest
import torch

from hdm.config.axes import OBJECTIVE, discover
from hdm.model import Backbone, Condition, Route
from hdm.model.backbone import Unlearned

discover()
B, C, SIDE, PATCH = 2, 3, 4, 2
DRAW = torch.Generator().manual_seed(3)
LATENTS, NOISE, OUTPUT = (torch.randn(B, C, SIDE, SIDE, generator=DRAW, dtype=torch.float64) for _ in range(3))
T = torch.tensor([0.3, 0.8], dtype=torch.float64)
REMOVED = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [1, 0]]], dtype=torch.bool)  # a quarter of each image's patches
MASK = REMOVED.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]


class Fixed(Backbone):
    """Predicts OUTPUT, float64, and removes the patches of MASK."""

    def __init__(self, reconstruction):
        super().__init__()
        self.output, self.reconstruction = torch.nn.Parameter(OUTPUT.clone()), reconstruction

    def forward(self, x, timestep, condition, *, route=None, tap=None):
        return Exact(self.output)

    def unlearned(self, route, size):
        assert size == (SIDE, SIDE)
        return None if route is None else Unlearned(mask=MASK, patch=PATCH, reconstruction=self.reconstruction)


def Exact(tensor):
    """The tensor, whose .float() keeps its precision."""
    tensor = tensor * 1
    tensor.float = lambda: tensor
    return tensor


def loss(name, model, *, routed=True):
    condition = Condition(text=torch.zeros(B, 1, 1), position=torch.zeros(B, 4, 2), aspect=torch.zeros(B))
    route = Route(noise=torch.zeros(B, 4)) if routed else None
    objective = OBJECTIVE.build(OBJECTIVE.get(name).config())
    return objective.loss(model, LATENTS, noise=NOISE, timestep=T, condition=condition, route=route)


@pytest.mark.parametrize("name", ["velocity", "x_prediction"])
def test_the_loss_is_the_mean_over_the_patches_that_stayed(name):
    model = Fixed(0.0)
    got = loss(name, model)
    target = (NOISE - LATENTS if name == "velocity" else LATENTS).numpy()
    for i in range(B):
        stays = ~np.broadcast_to(MASK[i].numpy(), target[i].shape)
        weight = 1.0 if name == "velocity" else 1 / max(float(T[i]), 0.05) ** 2
        expected = weight * ((OUTPUT[i].numpy() - target[i])[stays] ** 2).mean()
        assert got[i].item() == pytest.approx(expected, rel=1e-12)
    got.sum().backward()
    assert (model.output.grad[MASK.expand_as(OUTPUT)] == 0).all()
    assert (model.output.grad[~MASK.expand_as(OUTPUT)] != 0).all()


def test_mask_mae_compares_removed_patches_with_normed_patches_of_x_t():
    got, without = loss("velocity", Fixed(0.1)), loss("velocity", Fixed(0.0))
    for i in range(B):
        x_t = ((1 - T[i]) * LATENTS[i] + T[i] * NOISE[i]).numpy()
        row, column = (int(k) * PATCH for k in REMOVED[i].nonzero()[0])
        patch = (slice(None), slice(row, row + PATCH), slice(column, column + PATCH))
        normed = (x_t[patch] - x_t[patch].mean()) / np.sqrt(x_t[patch].var(ddof=1) + 1e-6)
        expected = 0.1 * ((OUTPUT[i].numpy()[patch] - normed) ** 2).mean()
        assert (got - without)[i].item() == pytest.approx(expected, rel=1e-10)


def test_an_unrouted_pass_learns_every_patch():
    expected = ((OUTPUT - (NOISE - LATENTS)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss("velocity", Fixed(0.1), routed=False), expected)
