"""Local attention: each image token attends to a window of the grid, and to all text; text attends to everything (spec 7).

A window layout is a set of tiles, each of which is one small dense attention: some queries, the keys that they may need, and a
mask that says which of these each query sees.

Shapes: B images, N image tokens, L other tokens, T = N + L, H heads, C channels per head, G tiles of U queries and V keys.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hdm.config.axes import ATTENTION
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, QKNorm, RunConfig
from hdm.model.attention import Layout, SelfAttention, attend, merge_heads
from hdm.model.encoding import Encoding

try:
    import natten
except ImportError:
    natten = None
else:
    from hdm.model import natten_flops

    natten_flops.register()


@dataclass(kw_only=True, slots=True)
class NeighborhoodConfig:
    """Each image token attends to the k x k image tokens around it (NAT, Hassani et al., 2023; HDiT, Crowson et al., 2024)."""

    takes: ClassVar[dict[str, str]] = {"joint": "it has one set of projections"}
    needs: ClassVar[dict[str, str]] = {"grid": "its windows are cut from the 2-D grid of image tokens"}
    adapts: ClassVar[dict[str, str]] = {
        "image_sequence": "image tokens attend to their window and to all text, text and time tokens to everything"
    }

    window: int = option(7, "side k of the neighborhood in tokens; at the border it shifts inwards, a shorter side is taken whole")
    qk_norm: QKNorm = option(QKNorm.none, "norm of each head's queries and keys: none, rms, layer or cosine (HDiT)")
    qkv_bias: bool = option(False, "a bias for queries, keys and values")

    def check(self, run: RunConfig) -> None:
        """Refuse a window of nothing."""
        from hdm.config.check import require

        require(self.window > 0, f"attention.window={self.window}: must be above 0; 7 in HDiT")


@dataclass(kw_only=True, slots=True)
class WindowConfig:
    """Windows of w x w tokens attend within themselves, in every other block shifted by w/2 (Swin, Liu et al., 2021)."""

    takes: ClassVar[dict[str, str]] = {"joint": "it has one set of projections"}
    needs: ClassVar[dict[str, str]] = {"grid": "its windows are cut from the 2-D grid of image tokens"}
    adapts: ClassVar[dict[str, str]] = {
        "image_sequence": "image tokens attend to their window and to all text, text and time tokens to everything"
    }

    window: int = option(8, "side w of a window in tokens; the last ones of a side that w does not divide are smaller")
    qk_norm: QKNorm = option(QKNorm.none, "norm of each head's queries and keys: none, rms, layer or cosine")
    qkv_bias: bool = option(False, "a bias for queries, keys and values (Swin)")

    def check(self, run: RunConfig) -> None:
        """Refuse windows that cannot be shifted by half."""
        from hdm.config.check import require

        require(
            self.window > 0 and self.window % 2 == 0,
            f"attention.window={self.window}: must be even and above 0, so that it can be shifted by half; 8 is usual",
        )


@dataclass(kw_only=True, slots=True)
class Side:
    """The tiles along one side of the grid: n of them, of u queries and v keys. Cells behind the end are padding.

    `seen` None: every query sees every key of its tile.
    """

    queries: Int[Tensor, "n u"]
    keys: Int[Tensor, "n v"]
    seen: Bool[Tensor, "n u v"] | None = None


class Tiles:
    """The tiles of a grid: those along its rows times those along its columns.

    `queries` and `keys` are the image tokens of all tiles one after the other, `back` is where each image token is among `queries`.
    A single tile holds the whole grid in order.
    """

    def __init__(self, grid: tuple[int, int], y: Side, x: Side) -> None:
        n = grid[0] * grid[1]
        self.count = len(y.queries) * len(x.queries)
        outside = (y.queries >= grid[0])[:, None, :, None] | (x.queries >= grid[1])[None, :, None, :]
        self.back = torch.where(outside, n, _cells(y.queries, x.queries, grid)).flatten().argsort(stable=True)[:n]
        self.queries, self.keys = _cells(y.queries, x.queries, grid).flatten(), _cells(y.keys, x.keys, grid).flatten()
        self.seen: Bool[Tensor, "G U V"] | None = None
        if y.seen is not None or x.seen is not None:
            rows, columns = (_all(side) if side.seen is None else side.seen for side in (y, x))
            seen = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
            self.seen = seen.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _cells(y: Int[Tensor, "a p"], x: Int[Tensor, "b q"], grid: tuple[int, int]) -> Int[Tensor, "a b p q"]:
    y, x = y.clamp(max=grid[0] - 1), x.clamp(max=grid[1] - 1)
    return y[:, None, :, None] * grid[1] + x[None, :, None, :]


def _all(side: Side) -> Bool[Tensor, "n u v"]:
    return torch.ones(*side.queries.shape, side.keys.shape[1], dtype=torch.bool, device=side.keys.device)


class Local(SelfAttention):
    """What both local attentions share; a variant cuts the tiles."""

    name: str

    def __init__(self, config: NeighborhoodConfig | WindowConfig, size: ModelConfig, encoding: Encoding, *, index: int = 0) -> None:
        super().__init__(size, encoding, qk_norm=config.qk_norm, qkv_bias=config.qkv_bias)
        self.window, self.index = config.window, index
        self._tiles: dict[tuple[tuple[int, int], torch.device], Tiles] = {}

    def cut(self, grid: tuple[int, int], device: torch.device) -> Tiles:
        """The tiles of a grid of (rows, columns)."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout, *, only: int | None = None) -> Float[Tensor, "B Q D"]:
        """See SelfAttention. Raises ValueError where the image tokens are no grid."""
        if layout.grid is None:
            raise ValueError(
                f"attention={self.name}: its windows need the complete grid of image tokens; use routing=none, or attention=full"
            )
        n = layout.grid[0] * layout.grid[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = self.sides(q, k, v, layout)
        mixed = self.image(q[:, :, :n], k, v, layout)
        if x.shape[1] > n and (only is None or only > n):
            mixed = torch.cat([mixed, merge_heads(attend(q[:, :, n:], k, v, layout.mask, scale=self.scale))], dim=1)
        return self.out(mixed[:, :only])

    def image(
        self, q: Float[Tensor, "B H N C"], k: Float[Tensor, "B H T C"], v: Float[Tensor, "B H T C"], layout: Layout
    ) -> Float[Tensor, "B N D"]:
        """What image tokens read of their windows and of the real ones of the tokens behind them."""
        assert layout.grid is not None
        key = (layout.grid, q.device)
        if key not in self._tiles:
            self._tiles[key] = self.cut(*key)
        text = None if layout.mask is None else layout.mask[:, q.shape[2] :]
        return read_tiles(self._tiles[key], q, k, v, text, scale=self.scale)


def read_tiles(
    tiles: Tiles,
    q: Float[Tensor, "B H N C"],
    k: Float[Tensor, "B H T C"],
    v: Float[Tensor, "B H T C"],
    text: Bool[Tensor, "B L"] | None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B N D"]:
    """Attention of each tile's queries to its keys and to all the tokens behind the N image tokens that `text` calls real."""
    batch, n, count = len(q), q.shape[2], tiles.count
    seen = _seen(tiles, text, batch, k.shape[2] - n)
    if count == 1:
        return merge_heads(attend(q, k, v, seen, scale=scale))

    parts = ((q, tiles.queries), (k, tiles.keys), (v, tiles.keys))
    q, k, v = (_fold(x, index, images=n, count=count) for x, index in parts)
    mixed = attend(q, k, v, seen, scale=scale)
    return merge_heads(mixed).reshape(batch, len(tiles.queries), -1).index_select(1, tiles.back)


def _fold(x: Float[Tensor, "B H T C"], index: Int[Tensor, " K"], *, images: int, count: int) -> Float[Tensor, "BG H V C"]:
    """The tiles of x as images of their own, with the tokens behind the image in each."""
    inside = x.transpose(1, 2).index_select(1, index).view(len(x), count, -1, *x[0, :, 0].shape)
    if x.shape[2] > images:
        inside = torch.cat([inside, x.transpose(1, 2)[:, None, images:].expand(-1, count, -1, -1, -1)], dim=2)
    return inside.flatten(0, 1).transpose(1, 2)


def _seen(tiles: Tiles, text: Bool[Tensor, "B L"] | None, batch: int, others: int) -> Bool[Tensor, "BG U V"] | None:
    """Which keys of its tile, and of the tokens behind the image, each query sees; None: all. One image may stand for all."""
    if text is None and tiles.seen is None:
        return None
    device = tiles.keys.device
    shape = (tiles.count, len(tiles.queries) // tiles.count, len(tiles.keys) // tiles.count)
    inside = torch.ones(shape, dtype=torch.bool, device=device) if tiles.seen is None else tiles.seen
    outside = torch.ones(1, others, dtype=torch.bool, device=device) if text is None else text
    images = 1 if text is None and tiles.count == 1 else batch
    seen = [inside.expand(images, -1, -1, -1), outside[:, None, None].expand(images, *shape[:2], -1)]
    return torch.cat(seen, dim=3).flatten(0, 1)


@ATTENTION.register("neighborhood", NeighborhoodConfig)
class Neighborhood(Local):
    """The window of token i on a side of L starts at clip(i - k//2, 0, L - k), so that it always has k tokens."""

    name = "neighborhood"

    def image(
        self, q: Float[Tensor, "B H N C"], k: Float[Tensor, "B H T C"], v: Float[Tensor, "B H T C"], layout: Layout
    ) -> Float[Tensor, "B N D"]:
        """See Local. On CUDA natten's kernel does it where there is one and the image is alone in the sequence."""
        assert layout.grid is not None
        alone = k.shape[2] == q.shape[2] and layout.mask is None
        if alone and min(self.window, *layout.grid) > 1 and natten_has_kernels(v):
            return by_natten(q, k, v, layout.grid, window=self.window, scale=self.scale)
        return super().image(q, k, v, layout)

    def cut(self, grid: tuple[int, int], device: torch.device) -> Tiles:
        """See Local. On the meta device a tile is one query and its window, so that FLOPs are those of the windows."""
        rows, columns = (1, 1) if device.type == "meta" else tile_sides(grid, self.window)
        sides = zip(grid, (rows, columns))
        y, x = (self._side(length, min(self.window, length), tile, device) for length, tile in sides)
        return Tiles(grid, y, x)

    @staticmethod
    def _side(length: int, k: int, tile: int, device: torch.device) -> Side:
        queries = torch.arange(length, device=device).view(-1, tile)
        start = (queries - k // 2).clamp(0, length - k)
        span = min(length, tile + k - 1)
        keys = start[:, :1].clamp(max=length - span) + torch.arange(span, device=device)
        seen = (keys[:, None] >= start[..., None]) & (keys[:, None] < start[..., None] + k)
        return Side(queries=queries, keys=keys, seen=None if span == k else seen)


def tile_sides(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """The tile of a grid, of sides that divide it, for which the fewest keys are computed and copied."""

    def cost(tile: tuple[int, int]) -> float:
        keys = math.prod(min(length, side + window - 1) for length, side in zip(grid, tile))
        return keys * (1 + 48 / math.prod(tile))

    divisors = ([side for side in range(1, length + 1) if length % side == 0] for length in grid)
    rows, columns = divisors
    return min(((r, c) for r in rows for c in columns), key=cost)


def natten_has_kernels(v: Float[Tensor, "B H N C"]) -> bool:
    """Whether natten's CUDA kernels take such heads. A natten without kernels would compute all N x N scores instead."""
    built = natten is not None and v.is_cuda and natten.HAS_LIBNATTEN
    return built and v.shape[-1] % 8 == 0 and v.dtype is not torch.float64


def by_natten(
    q: Float[Tensor, "B H N C"],
    k: Float[Tensor, "B H N C"],
    v: Float[Tensor, "B H N C"],
    grid: tuple[int, int],
    *,
    window: int,
    scale: float | None = None,
) -> Float[Tensor, "B N D"]:
    """Neighborhood attention by natten (0.21 or newer), in the dtype of `v`."""
    parts = (part.to(v.dtype).transpose(1, 2).reshape(len(q), *grid, *q[0, :, 0].shape) for part in (q, k, v))
    mixed = natten.na2d(*parts, kernel_size=tuple(min(window, side) for side in grid), scale=scale)
    return mixed.flatten(3).flatten(1, 2)


@ATTENTION.register("window", WindowConfig)
class Window(Local):
    """Windows start at multiples of w, in blocks of odd number at w/2 before them; a side of at most w tokens is one window.

    As Swin does it, the shifted grid is rolled so that the parts that remain at both of its ends share tiles, where they do not
    see each other.
    """

    name = "window"

    def cut(self, grid: tuple[int, int], device: torch.device) -> Tiles:
        """See Local."""
        y, x = (self._side(length, device) for length in grid)
        return Tiles(grid, y, x)

    def _side(self, length: int, device: torch.device) -> Side:
        w = min(self.window, length)
        shift = w // 2 if self.index % 2 and length > w else 0
        padded = math.ceil(length / w) * w
        cells = ((torch.arange(padded, device=device) + shift) % padded).view(-1, w)
        part = torch.where(cells < length, (cells + w - shift) // w, -1)
        uncut = shift == 0 and padded == length
        return Side(queries=cells, keys=cells, seen=None if uncut else part[:, :, None] == part[:, None, :])
