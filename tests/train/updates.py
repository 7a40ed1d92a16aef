"""A few matrices with fixed gradients, for the tests of update rules."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from hdm import rng
from hdm.train.optimizer import clipped_step


class Small(nn.Module):
    """A network of three layers whose hidden one is held as two stacked matrices; `width` reads `width`."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.architecture = SimpleNamespace(size=SimpleNamespace(dim=width))
        self.enter = nn.Linear(3, width)
        self.stacked = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, 2)

    def parts(self):
        return {"stacked.weight": 2}

    def wider(self):
        with torch.device("meta"):
            return Small(2 * self.architecture.size.dim)


HIDDEN = {"stacked.weight", "down.weight"}


def small(width: int = 6, dtype: torch.dtype = torch.float32) -> Small:
    model = Small(width).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, name, [0], parameter.shape)[0]))
    return model


def gradient(name, shape, step, scale=1.0):
    return scale * torch.from_numpy(rng.normal(1, name, [step], shape)[0])


def run(optimizer, model, steps, *, clip=0.0, scale=1.0, start=0):
    """`steps` updates with the gradients of these steps; the last norm."""
    norm = None
    for step in range(start, start + steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step, scale).to(parameter.dtype)
        norm = clipped_step(optimizer, clip)
    return norm


def state_of(optimizer, model):
    """Copies of everything that a step changes."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"evaluated/{i}": t.clone() for i, t in enumerate(optimizer.evaluated(model))}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{entry}": t.clone() for entry, t in copy.copy(optimizer.state.get(parameter, {})).items()}
    return tensors
