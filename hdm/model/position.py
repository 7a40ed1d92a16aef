"""The position axis: where each image token lies, in closed form from the view that it was cut from.

A view is (image height H, image width W, top, left, height, width) in pixels. Token (i, j) of a grid laid over it has its centre at
the pixel (top + (i + 1/2) height / rows, left + (j + 1/2) width / columns); a map turns that into coordinates that do not depend on
the size of the image. A crop therefore gets exactly the positions that its tokens have in the whole image (spec 5).
"""

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import POSITION
from hdm.config.registry import option
from hdm.config.schema import RunConfig


class Origin(Enum):
    """Where the coordinates are zero."""

    centre = "centre"
    corner = "corner"


class Edges(Enum):
    """The coordinate of the outermost tokens of a grid."""

    exact = "exact"
    resampled = "resampled"


@dataclass(kw_only=True, slots=True)
class Rect1Config:
    """The report's map: ranges rH = sqrt(H/W) and rW = sqrt(W/H), so that rH rW = 1 and every pixel has the same size."""

    origin: Origin = option(Origin.centre, "centre: zero, where the text lies, is the middle of the image; corner: its top left")


@dataclass(kw_only=True, slots=True)
class BboxConfig:
    """The upstream code's map: the longer side covers [-1, 1], the shorter one its share of it (spec 1.3 b)."""

    edges: Edges = option(Edges.exact, "exact token centres, or those of a map resampled from latent pixels (spec 1.3 g)")


class Interpolation(Enum):
    """What becomes of token numbers on a grid of another size than the base."""

    none = "none"
    base = "base"


@dataclass(kw_only=True, slots=True)
class IntegerConfig:
    """Token numbers: the token in row i and column j of the whole image lies at (i, j) (DiT, EVA, Flux)."""

    interpolation: Interpolation = option(
        Interpolation.none, "none: the numbers themselves; base: i x base / rows / scale, likewise for columns (PixArt, MicroDiT)"
    )
    base: int = option(16, "tokens along the side of the square image that the encoding's scales are relative to")
    scale: float = option(1.0, "divisor of interpolated numbers")

    def check(self, run: RunConfig) -> None:
        """Refuse a grid of no size."""
        from hdm.config.check import require

        require(self.base > 0, f"position.base={self.base}: must be above 0")
        require(self.scale > 0, f"position.scale={self.scale}: must be above 0")


class PositionMap(nn.Module):
    """Coordinates (y, x) of the tokens of a grid laid over a view. A square image covers `square` = (low, high) on both axes."""

    square: tuple[float, float]

    def forward(self, view: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B N 2"]:
        """Row by row, N = rows * columns."""
        y, x = (self.along(view, grid[axis], axis=axis) for axis in (0, 1))
        y, x = y[:, :, None].expand(-1, *grid), x[:, None, :].expand(-1, *grid)
        return torch.stack([y, x], dim=-1).flatten(1, 2)

    def along(self, view: Float[Tensor, "B 6"], count: int, *, axis: int) -> Float[Tensor, "B T"]:
        """Coordinates of the `count` tokens along one `axis` (0: y, 1: x) of the view."""
        start, size = view[:, 2 + axis, None], view[:, 4 + axis, None]
        return self.coordinate(start + size * self.centres(count, view), view[:, 0:2], axis=axis)

    def centres(self, count: int, like: Tensor) -> Float[Tensor, " T"]:
        """Centres of `count` tokens along one side of the view, whose length is 1."""
        return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count

    def coordinate(self, pixel: Float[Tensor, "B T"], image: Float[Tensor, "B 2"], *, axis: int) -> Float[Tensor, "B T"]:
        """The coordinate of `pixel` along `axis` (0: y, 1: x) of images of size (height, width)."""
        raise NotImplementedError


@POSITION.register("rect1", Rect1Config)
class Rect1(PositionMap):
    """pixel / sqrt(H W), from the chosen origin."""

    def __init__(self, config: Rect1Config) -> None:
        super().__init__()
        self.origin = config.origin
        self.square = (-0.5, 0.5) if config.origin is Origin.centre else (0.0, 1.0)

    def coordinate(self, pixel: Float[Tensor, "B T"], image: Float[Tensor, "B 2"], *, axis: int) -> Float[Tensor, "B T"]:
        """(p / H - 1/2) rH = (p - H/2) / sqrt(H W)."""
        zero = image[:, axis, None] / 2 if self.origin is Origin.centre else 0.0
        return (pixel - zero) / image.prod(dim=1, keepdim=True).sqrt()


@POSITION.register("bbox", BboxConfig)
class Bbox(PositionMap):
    """(2 pixel - side) / max(H, W)."""

    square = (-1.0, 1.0)

    def __init__(self, config: BboxConfig) -> None:
        super().__init__()
        self.edges = config.edges

    def centres(self, count: int, like: Tensor) -> Float[Tensor, " T"]:
        """As the base class; a resampled map pulls the outermost tokens inwards by 3/28 of a token.

        Antialiased bilinear reduction by two weighs the latent pixels at -3/2, -1/2, 1/2, 3/2 from a token's centre with 1, 3, 3,
        1. At an edge the outermost is missing, and the mean of the other three lies (-3/2 + 3/2 + 3/2) / 7 = 3/14 pixels inwards.
        """
        centres = PositionMap.centres(self, count, like)
        if self.edges is Edges.resampled:
            centres[0] += 3 / 28 / count
            centres[-1] -= 3 / 28 / count
        return centres

    def coordinate(self, pixel: Float[Tensor, "B T"], image: Float[Tensor, "B 2"], *, axis: int) -> Float[Tensor, "B T"]:
        """The longer side covers [-1, 1]."""
        return (2 * pixel - image[:, axis, None]) / image.amax(dim=1, keepdim=True)


@POSITION.register("integer", IntegerConfig)
class Integer(PositionMap):
    """See IntegerConfig. A token is as large as the view's: a crop has the numbers that its tokens have in the whole image."""

    def __init__(self, config: IntegerConfig) -> None:
        super().__init__()
        self.config = config
        self.square = (-0.5, config.base - 0.5)

    def along(self, view: Float[Tensor, "B 6"], count: int, *, axis: int) -> Float[Tensor, "B T"]:
        """The first token of the image has number 0."""
        image, start, size = view[:, axis, None], view[:, 2 + axis, None], view[:, 4 + axis, None]
        number = start * count / size + torch.arange(count, dtype=view.dtype, device=view.device)
        if self.config.interpolation is Interpolation.none:
            return number
        return number * (self.config.base / self.config.scale) * size / count / image
