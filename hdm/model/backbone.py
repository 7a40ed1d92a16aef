"""What every backbone is built from, is given and returns."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hdm.config.axes import AXES, discover
from hdm.config.schema import ModelConfig, RunConfig


def _default(axis: str) -> Any:
    return dataclasses.field(default_factory=lambda: discover()[axis].default_config())


@dataclass(kw_only=True, slots=True)
class Architecture:
    """Everything that decides a network's shape. `Architecture()` is XUT-base of the report."""

    size: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    in_channels: int = 4
    context_dim: int = 1024
    backbone: Any = _default("backbone")
    merge: Any = _default("merge")
    adaln: Any = _default("adaln")
    norm: Any = _default("norm")
    attention: Any = _default("attention")
    mlp: Any = _default("mlp")
    position: Any = _default("position")
    encoding: Any = _default("encoding")
    routing: Any = _default("routing")
    text_fusion: Any = _default("text_fusion")

    @classmethod
    def of(cls, run: RunConfig) -> "Architecture":
        """The architecture of a run: its model sizes and axes, its autoencoder's channels and its text encoder's width."""
        axes = {f.name: getattr(run, f.name) for f in dataclasses.fields(cls) if f.name in AXES}
        return cls(size=run.model, in_channels=run.autoencoder.channels, context_dim=run.text_encoder.width, **axes)


@dataclass(kw_only=True, slots=True)
class Condition:
    """What steers a prediction. B images, L text tokens, N image tokens.

    `text_mask` is True where a token is real; None means all are. `position` holds (y, x) of every image token, from
    `Backbone.position_map`; `aspect` is log(width / height) of the whole image (spec 1.3 j).
    """

    text: Float[Tensor, "B L D"]
    text_mask: Bool[Tensor, "B L"] | None = None
    position: Float[Tensor, "B N 2"]
    aspect: Float[Tensor, " B"]

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        """The condition of some of the images."""
        mask = None if self.text_mask is None else self.text_mask[rows]
        return Condition(text=self.text[rows], text_mask=mask, position=self.position[rows], aspect=self.aspect[rows])

    def to(self, device: torch.device | str) -> "Condition":
        """The same on another device."""
        mask = None if self.text_mask is None else self.text_mask.to(device)
        return Condition(
            text=self.text.to(device), text_mask=mask, position=self.position.to(device), aspect=self.aspect.to(device)
        )


@dataclass(kw_only=True, slots=True)
class Route:
    """A request to route image tokens: uniform draws that order them, and the fraction that bypasses (None: as configured)."""

    noise: Float[Tensor, "B N"]
    rate: float | None = None


@dataclass(kw_only=True, slots=True)
class Tap:
    """A request for the image tokens behind block `depth`; the pass fills the rest in.

    Block 1 is the first, in the order of the forward pass. `kept`: indices of these tokens among all N; None: all, in order.
    """

    depth: int
    tokens: Float[Tensor, "B K D"] | None = None
    kept: Int[Tensor, "B K"] | None = None


class Backbone(nn.Module):
    """A network that predicts the velocity of flow matching, v = eps - x (spec 11)."""

    architecture: Architecture

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        *,
        route: Route | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Velocity at `x` and `timestep` in [0, 1], 1 being noise. Without `route` every token takes every block."""
        raise NotImplementedError

    def position_map(self, view: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B N 2"]:
        """Positions (y, x) of the token `grid` (rows, columns) laid over a view.

        A view is (image height, image width, top, left, height, width) in pixels: the box that the tokens cover and the image it
        was cut from. Tokens run row by row.
        """
        raise NotImplementedError


def full_view(height: int | float, width: int | float, batch: int = 1) -> Float[Tensor, "B 6"]:
    """The view that is the whole image."""
    return torch.tensor([[height, width, 0.0, 0.0, height, width]]).repeat(batch, 1)
