"""HDiT, the hourglass (Crowson et al., 2024): local attention on fine grids, global attention on the coarsest.

    patches (w0) ─ blocks ─ merge 2x2 (w1) ─ blocks ─ split 2x2 ─ blocks (w0) ─ patches
                     └────────────── skip ──────────────┘

A level has half the width, and twice the grid side, of the level inside it; the innermost has `model.dim`. The attention axis
acts on the outer levels, the innermost attends fully.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import ADALN, BACKBONE, ENCODING, MERGE, NORM, POSITION, TEXT_FUSION
from hdm.config.registry import option
from hdm.config.schema import BackboneConfig, Final, ModelConfig, RunConfig
from hdm.model.attention import FullConfig, Layout
from hdm.model.backbone import Architecture, Condition, Route, Tap
from hdm.model.block import Block, Place
from hdm.model.embed import AspectEmbed, PatchEmbed, PatchOutput, TimeEmbed
from hdm.model.init import Init, zeros
from hdm.model.trunk import BlockStack, Pass


@dataclass(kw_only=True, slots=True)
class HditConfig(BackboneConfig):
    """An hourglass whose outer levels attend locally, with 2x2 token merges and splits (HDiT, Crowson et al., 2024).

    The time embedding has the width of the innermost level and is projected to each outer one; HDiT's mapping network has one
    width and each norm projects it.
    """

    implies: ClassVar[dict[str, str]] = {
        "merge": "lerp", "adaln": "scale_only", "norm": "rms", "norm.affine": "false", "mlp": "geglu",
        "attention": "neighborhood", "attention.qk_norm": "cosine",
        "encoding": "axial_rope", "encoding.spacing": "log_open", "encoding.high": "10.0", "encoding.order": "blocks",
        "encoding.pairs": "half_split", "text_fusion": "cross_attn", "routing": "none",
    }  # fmt: skip
    needs: ClassVar[dict[str, str]] = {
        "grid": "2x2 tokens are merged",
        "image_sequence": "text has no place on a grid that is merged",
    }
    takes: ClassVar[dict[str, str]] = {"one_grid": "its levels have grids of their own"}

    final_norm: bool = option(True, "a norm, of the norm axis, before the output layer")
    zero_output: bool = option(True, "the output layer starts at zero (DiT); false: at std 1/dim^2 (XUT)")
    levels: int = option(2, "levels, the innermost included")
    outer: int = option(2, "blocks of an outer level on each side")
    inner: int | None = option(
        None, "blocks of the innermost level; null: what makes as many blocks in all as XUT has at these sizes"
    )

    def check(self, run: RunConfig) -> None:
        """Refuse widths and grids that cannot be halved as often as there are levels."""
        from hdm.config.check import require

        m, half = run.model, 2 ** (self.levels - 1)
        require(self.levels >= 1, f"backbone.levels={self.levels}: must be 1 or more")
        require(
            self.final is Final.none,
            f"backbone.final={self.final.name}: the time embedding is wider than the outermost level of backbone=hdit; use none",
        )
        require(
            m.heads % half == 0 and m.mlp_dim % half == 0 and m.dim % (2 * half) == 0,
            f"backbone.levels={self.levels}: the outermost level has model.dim / {half} channels, which model.heads={m.heads},"
            f" model.mlp_dim={m.mlp_dim} or model.dim={m.dim} do not allow; use fewer levels or multiples of {half}",
        )
        require(self.outer >= 1, f"backbone.outer={self.outer}: must be 1 or more")
        require(self.innermost(m) >= 1, f"backbone.inner={self.innermost(m)}: must be 1 or more; set it, or fewer outer blocks")
        cell = run.autoencoder.factor * m.patch * half
        size = getattr(run.crop, "size", 0)
        require(size % cell == 0, f"crop.size={size}: backbone.levels={self.levels} halve the token grid, use a multiple of {cell}")

    def innermost(self, size: ModelConfig) -> int:
        """Blocks of the innermost level."""
        return size.blocks - 2 * self.outer * (self.levels - 1) if self.inner is None else self.inner


class Level(nn.Module):
    """A level: its way down and up, and what all of its blocks share. The innermost has a way down only."""

    def __init__(self, a: Architecture, *, number: int, owner: "HDiT") -> None:
        super().__init__()
        config: HditConfig = a.backbone
        inmost = number == config.levels - 1
        shrink = 2 ** (config.levels - 1 - number)
        size = dataclasses.replace(a.size, dim=a.size.dim // shrink, heads=a.size.heads // shrink, mlp_dim=a.size.mlp_dim // shrink)
        attention = FullConfig(qk_norm=getattr(a.attention, "qk_norm", FullConfig().qk_norm)) if inmost else a.attention
        a = dataclasses.replace(a, size=size, attention=attention)
        self.encoding = ENCODING.build(a.encoding, size, owner.position.square)
        total = config.innermost(owner.architecture.size) + 2 * config.outer * (config.levels - 1)

        def block(side: str, i: int, index: int, *, merge: bool = False) -> Block:
            place = Place(name=f"levels.{number}.{side}.{i}", index=index, count=total)
            merger = MERGE.build(a.merge, size, self.encoding) if merge else None
            return Block(place, a, encoding=self.encoding, fusion=owner.text, merge=merger)

        start = number * config.outer
        count = config.innermost(owner.architecture.size) if inmost else config.outer
        self.down = nn.ModuleList(block("down", i, start + i) for i in range(count))
        end = total - start - count
        self.up = nn.ModuleList() if inmost else nn.ModuleList(block("up", i, end + i, merge=i == 0) for i in range(count))
        sublayers = [name for each in (*self.down, *self.up) for name in cast(Block, each).sublayers()]
        self.adaln = ADALN.build(a.adaln, size.dim, sublayers)
        self.time = nn.Identity() if inmost else nn.Linear(owner.architecture.size.dim, size.dim, bias=False)
        if not inmost:
            self.merge = nn.Linear(4 * size.dim, 2 * size.dim, bias=False)
            self.split = nn.Linear(2 * size.dim, 4 * size.dim, bias=False)


@BACKBONE.register("hdit", HditConfig)
class HDiT(BlockStack):
    """See HditConfig."""

    def _build(self, a: Architecture) -> None:
        size, config = a.size, a.backbone
        self.outermost = size.dim // 2 ** (config.levels - 1)
        self.patch = PatchEmbed(a.in_channels, self.outermost, size.patch)
        self.time, self.aspect = TimeEmbed(size.dim), AspectEmbed(size.dim)
        self.text = TEXT_FUSION.build(a.text_fusion, a.context_dim, size.dim)
        self.position = POSITION.build(a.position)
        self.levels = nn.ModuleList(Level(a, number=i, owner=self) for i in range(config.levels))
        norm = NORM.build(a.norm, self.outermost) if config.final_norm else None
        self.out = PatchOutput(a.in_channels, self.outermost, size.patch, norm=norm, zero=config.zero_output)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`, and Trunk."""
        found: dict[str, Init] = {}
        for level in map(self.level, range(len(self.levels))):
            if level.adaln.zero_outputs:
                ends = [end for block in (*level.down, *level.up) for end in cast(Block, block).outputs()]
                found |= {f"{end}.{leaf}": zeros for end in ends for leaf, _ in self.get_submodule(end).named_parameters()}
        return found

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        *,
        route: Route | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """See Backbone. Raises ValueError for a token grid that the levels do not halve."""
        del route  # the configuration refuses every routing but none
        patch, half = self.patch.patch, 2 ** (len(self.levels) - 1)
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        if grid[0] % half or grid[1] % half:
            raise ValueError(f"{grid[0]} x {grid[1]} tokens: backbone=hdit halves both sides {len(self.levels) - 1} times")
        tokens = self.patches(x, condition.position)
        time, (text, mask) = self.time(timestep) + self.aspect(condition.aspect), self.text(condition)
        halves = self.level(0).encoding.halves
        layout = Layout(position=condition.position, halves=halves, images=tokens.shape[1], grid=grid, text=text, text_mask=mask)
        tokens, _ = self._through(0, tokens, layout, time=time, tap=tap, depth=0)
        return self.out(tokens, grid).to(x.dtype)

    def _through(
        self,
        number: int,
        tokens: Float[Tensor, "B N W"],
        layout: Layout,
        *,
        time: Float[Tensor, "B 1 D"],
        tap: Tap | None,
        depth: int,
    ) -> tuple[Float[Tensor, "B N W"], int]:
        """Level `number` and all that it holds, and the blocks behind."""
        level, grid = self.level(number), layout.grid
        assert grid is not None
        absolute = level.encoding.embed(layout.position)
        tokens = tokens if absolute is None else tokens + absolute.to(tokens.dtype)
        layout.time = level.time(time)
        layout.rotation = level.encoding.rotation(layout.position)
        p = Pass(layout=layout, whole=layout, modulation=level.adaln(layout.time), tap=tap, depth=depth)
        for block in level.down:
            tokens = self.run(cast(Block, block), tokens, p)
        if number == len(self.levels) - 1:
            return tokens, p.depth

        state = tokens
        inner = dataclasses.replace(
            layout,
            rotation=None,  # of the outer grid
            position=cells(layout.position, grid).mean(dim=2),
            images=tokens.shape[1] // 4,
            grid=(grid[0] // 2, grid[1] // 2),
        )
        tokens, p.depth = self._through(
            number + 1, level.merge(cells(tokens, grid).flatten(2)), inner, time=time, tap=tap, depth=p.depth
        )
        split: Tensor = level.split(tokens)
        tokens = from_cells(split.view(*split.shape[:2], 4, -1), (grid[0] // 2, grid[1] // 2))
        for i, block in enumerate(level.up):
            tokens = self.run(cast(Block, block), tokens, p, state=state if i == 0 else None)
        return tokens, p.depth

    def level(self, number: int) -> Level:
        """One of the levels, the outermost first."""
        return cast(Level, self.levels[number])


def cells(tokens: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B M 4 D"]:
    """The tokens of each cell of 2 x 2, row by row."""
    quads = tokens.view(len(tokens), grid[0] // 2, 2, grid[1] // 2, 2, -1).transpose(2, 3)
    return quads.flatten(3, 4).flatten(1, 2)


def from_cells(quads: Float[Tensor, "B M 4 D"], grid: tuple[int, int]) -> Float[Tensor, "B N D"]:
    """The inverse; `grid` is that of the cells."""
    return quads.view(len(quads), *grid, 2, 2, -1).transpose(2, 3).flatten(1, 4)
