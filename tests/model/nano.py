"""A network of a few thousand parameters and its inputs, for the tests of this folder."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import config as jaxtyping_config

from hdm.config import compat
from hdm.config.axes import discover
from hdm.config.compose import compose
from hdm.config.schema import ModelConfig, RunConfig
from hdm.model import Architecture, Backbone, Condition, Route, build, full_view

SIZE = ModelConfig(size="test", dim=32, mlp_dim=48, heads=2, head_dim=16, depth=2, dec_blocks=2, post_depth=1)
CONTEXT = 24
MODEL_AXES = tuple(field.name for field in dataclasses.fields(Architecture) if field.name in discover())


@cache
def published(backbone: str) -> RunConfig:
    """The backbone with what its published form implies for the other axes."""
    return compose(["experiment=none", f"backbone={backbone}"])


def architecture(*, size: dict[str, Any] | None = None, **axes: Any) -> Architecture:
    """The test network; `merge="add"` or `merge=("cross", {"pairing": Pairing.deepest})` chooses a variant.

    On the other axes stands what the backbone implies, or the nearest variant that goes with what is chosen.
    """
    choices = {axis: (choice, {}) if isinstance(choice, str) else choice for axis, choice in axes.items()}
    base = published(choices.get("backbone", ("xut", {}))[0])
    rest = {axis: discover()[axis].of(getattr(base, axis)) for axis in MODEL_AXES}
    variants = compat.completed({axis: discover()[axis].get(name) for axis, (name, _) in choices.items()}, rest)
    configs = {
        axis: variant.config(**choices.get(axis, ("", {}))[1])
        if axis in choices or variant is not rest[axis]
        else dataclasses.replace(getattr(base, axis))
        for axis, variant in variants.items()
    }
    return Architecture(size=dataclasses.replace(SIZE, **(size or {})), context_dim=CONTEXT, **configs)


def perturb(model: Backbone, std: float = 0.1) -> Backbone:
    """Move every parameter away from its initial value, so that no zero hides a path."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter.dtype)
    return model


class Pristine(dict[str, Backbone]):
    """Networks as they were built, by all that they were built from: building one takes ten times as long as copying it."""

    def copy_of(self, seed: int, perturbed: bool, axes: dict[str, Any]) -> Backbone:
        key = f"{seed} {perturbed} {sorted(axes.items())}"
        if key not in self:
            model = build(architecture(**axes), seed=seed)
            self[key] = perturb(model) if perturbed else model
        return copy.deepcopy(self[key])


PRISTINE = Pristine()


def network(*, seed: int = 0, perturbed: bool = True, **axes: Any) -> Backbone:
    """A built test network on the CPU, the caller's own."""
    return PRISTINE.copy_of(seed, perturbed, axes)


@contextmanager
def shapes_unchecked() -> Iterator[None]:
    """Without jaxtyping's checks, for paths where they are on elsewhere: they cost more than these small networks."""
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


@dataclasses.dataclass
class Inputs:
    """Arguments of a forward pass."""

    x: torch.Tensor
    timestep: torch.Tensor
    condition: Condition
    route: Route

    def run(self, model: Backbone, *, routed: bool = False) -> torch.Tensor:
        return model(self.x, self.timestep, self.condition, route=self.route if routed else None)


def inputs(
    model: Backbone,
    *,
    grid: tuple[int, int] = (4, 4),
    batch: int = 2,
    text: int = 3,
    padded: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Fixed inputs for a token `grid`; with `padded`, the last image has one text token less."""
    draw = torch.Generator().manual_seed(11)
    n, patch = grid[0] * grid[1], model.architecture.size.patch
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[-1, -1] = not padded
    view = full_view(16.0 * grid[0], 16.0 * grid[1], batch).to(dtype)
    return Inputs(
        x=torch.randn(batch, 4, grid[0] * patch, grid[1] * patch, generator=draw, dtype=dtype),
        timestep=torch.rand(batch, generator=draw, dtype=dtype),
        condition=Condition(
            text=torch.randn(batch, text, CONTEXT, generator=draw, dtype=dtype),
            text_mask=mask,
            position=model.position_map(view, grid),
            aspect=torch.randn(batch, generator=draw, dtype=dtype),
        ),
        route=Route(noise=torch.rand(batch, n, generator=draw, dtype=dtype)),
    )
