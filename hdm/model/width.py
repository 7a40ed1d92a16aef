"""How the parameters of a network grow with its width, found by building it again at twice the width, without memory.

Maximal-update parametrisation (muP; Yang et al., "Tensor Programs V", arXiv 2203.03466; spec 10) treats a parameter by which of its
axes grow. No list of names says it: the shapes at two widths do, as base shapes do in the authors' `mup` package, so it holds for
every variant. Heads are of one size and their number grows; the MLP keeps its ratio.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from hdm.config.errors import ConfigError
from hdm.model.backbone import Architecture


class Role(Enum):
    """What a parameter does in the limit of infinite width."""

    vector = "vector"  # biases, gains, scalars, embedding tables: one axis that grows, or none
    input = "input"  # from a fixed number of channels to the width
    hidden = "hidden"  # from width to width
    output = "output"  # from the width to a fixed number of channels


@dataclass(kw_only=True, slots=True)
class Growth:
    """The role of one parameter, and the width that it reads at the network's width and at twice that (1 and 1: none)."""

    role: Role
    width: int = 1
    doubled: int = 1

    def multiple(self, ratio: float) -> float:
        """The width that is read over the one at `ratio` times the network's width; every axis grows along a straight line."""
        return self.width / (self.width + (self.doubled - self.width) * (ratio - 1))


def at_width(architecture: Architecture, dim: int) -> Architecture:
    """`architecture` at width `dim`, with heads of the same size. Raises ConfigError when there is no such network."""
    return dataclasses.replace(architecture, size=architecture.size.at_width(dim))


def growth(model: nn.Module) -> dict[str, Growth]:
    """How every parameter of `model`, by name, grows with its width.

    `model` is a Backbone, or states its own wider self, on the meta device, in a method `wider()`. Raises ConfigError for another.
    """
    wider = {name: parameter.shape for name, parameter in _wider(model).named_parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        if name not in wider or len(wider[name]) != parameter.ndim:
            raise ConfigError(
                f"{name}: how it grows with the width is not known; give {type(model).__name__} a method wider(), which returns"
                " itself at twice the width, or choose optimizer.rule=mup_report"
            )
        found[name] = _growth(model.get_submodule(name.rpartition(".")[0]), parameter.shape, wider[name])
    return found


def _wider(model: nn.Module) -> nn.Module:
    from hdm.model import build

    if hasattr(model, "wider"):
        return model.wider()  # type: ignore[operator]
    if not hasattr(model, "architecture"):
        raise ConfigError(
            f"{type(model).__name__}: is no Backbone and has no method wider(), which returns itself at twice the width;"
            " choose optimizer.rule=mup_report"
        )
    architecture: Any = model.architecture
    return build(at_width(architecture, 2 * architecture.size.dim), device="meta", seed=None)


def _growth(module: nn.Module, shape: torch.Size, wider: torch.Size) -> Growth:
    """From the axes that grow. A linear layer or convolution reads its axis 1; of another parameter the last to grow counts."""
    grown = [axis for axis, (now, then) in enumerate(zip(shape, wider, strict=True)) if then != now]
    layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and len(shape) >= 2
    if len(grown) >= 2:
        return Growth(role=Role.hidden, width=shape[grown[-1]], doubled=wider[grown[-1]])
    if layer and grown == [0]:
        return Growth(role=Role.input)
    if layer and grown == [1]:
        return Growth(role=Role.output, width=shape[1], doubled=wider[1])
    return Growth(role=Role.vector)
