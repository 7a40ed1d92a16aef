"""What networks of one stream of tokens share: the entrance, three sections of blocks with a route, the exit.

    latents ─ patches ┐              ┌ bypassing tokens ┐
                      ├─ before ─ route ─── middle ─── join ─ after ─ patches ─ velocity
    text ── fusion ───┘

A backbone makes its blocks in `blocks()` and says in `before`, `middle` and `after` how tokens go through them. Tokens are [image,
text, time] where text and time are part of the sequence. Shapes: B images, N image tokens, K of them kept, L text tokens, T tokens,
D width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdm.config.axes import ADALN, ENCODING, MERGE, NORM, POSITION, ROUTING, TEXT_FUSION
from hdm.model.adaln import AdaLN, Modulation
from hdm.model.attention import Layout
from hdm.model.backbone import Architecture, Backbone, Condition, Route, Tap, Unlearned
from hdm.model.block import Block, Place
from hdm.model.embed import AspectEmbed, PatchEmbed, PatchOutput, TimeEmbed, final_modulation
from hdm.model.encoding import Encoding
from hdm.model.init import Init, materialize, zeros
from hdm.model.position import PositionMap
from hdm.model.routing import Routing, Section
from hdm.model.text_fusion import TextFusion


@dataclass(kw_only=True, slots=True)
class Pass:
    """One forward pass on its way: what the next block must know, and how many blocks are behind.

    `layout` is of the tokens that are there, `whole` of all. While some bypass, `kept` are the image tokens that do not and `index`
    the tokens that do not, among all. `states` are those that a later block merges.
    """

    layout: Layout
    whole: Layout
    modulation: Mapping[str, Modulation | None]
    tap: Tap | None = None
    kept: Int[Tensor, "B K"] | None = None
    index: Int[Tensor, "B S"] | None = None
    depth: int = 0
    states: list[Tensor] = field(default_factory=list)


class BlockStack(Backbone):
    """A backbone made of blocks, with the initial values of `seed`; under `torch.device("meta")` it has none."""

    patch: PatchEmbed
    position: PositionMap

    def __init__(self, architecture: Architecture, *, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        device = torch.get_default_device()
        with torch.device("meta"):
            self._build(architecture)
        if device.type != "meta":
            materialize(self, device, seed)

    @abstractmethod
    def _build(self, a: Architecture) -> None:
        """Make the modules."""

    def run(self, block: Block, tokens: Float[Tensor, "B T D"], p: Pass, *, state: Tensor | None = None) -> Float[Tensor, "B Q D"]:
        """Take a block of the network; the tap is filled behind the one that it asks for."""
        tokens = self._call(block, tokens, p, state=state)
        p.depth += 1
        if p.tap is not None and p.tap.depth == p.depth:
            p.tap.tokens, p.tap.kept = tokens[:, : p.layout.images], p.kept
        return tokens

    def _call(self, block: Block, tokens: Tensor, p: Pass, **kwargs: Any) -> Tensor:
        modulation = block.own(p.modulation)
        if self.architecture.size.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, p.layout, modulation, use_reentrant=False, preserve_rng_state=False, **kwargs)
        out: Tensor = block(tokens, p.layout, modulation, **kwargs)
        return out

    def tap_width(self, depth: int) -> int:
        """See Backbone."""
        widths = {block.index + 1: block.dim for block in self.modules() if isinstance(block, Block) and block.index >= 0}
        if depth not in widths:
            raise ValueError(f"depth={depth}: the network has blocks 1 to {len(widths)}")
        return widths[depth]

    def position_map(self, view: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B N 2"]:
        """See Backbone."""
        return self.position(view, grid)

    def patches(self, x: Float[Tensor, "B C H W"], position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"]:
        """The image tokens. Raises ValueError when the position map is of another grid than the latents."""
        image: Tensor = self.patch(x)
        if position.shape[1] != image.shape[1]:
            raise ValueError(
                f"{position.shape[1]} positions for {image.shape[1]} image tokens; make them by position_map(view, grid)"
            )
        return image


class Trunk(BlockStack):
    """Three sections of blocks, of which a route may leave out tokens."""

    def _build(self, a: Architecture) -> None:
        size = a.size
        self.patch = PatchEmbed(a.in_channels, size.dim, size.patch)
        self.time = TimeEmbed(size.dim)
        self.aspect = AspectEmbed(size.dim)
        self.text: TextFusion = TEXT_FUSION.build(a.text_fusion, a.context_dim, size.dim)
        self.position: PositionMap = POSITION.build(a.position)
        self.encoding: Encoding = ENCODING.build(a.encoding, size, self.position.square)
        self.routing: Routing = ROUTING.build(a.routing, size)
        self.mixer = nn.ModuleList(self.block(Place(name=f"mixer.{i}", index=-1)) for i in range(self.routing.mixers))
        self.blocks()
        sublayers = [name for block in self.modules() if isinstance(block, Block) for name in block.sublayers()]
        self.adaln: AdaLN = ADALN.build(a.adaln, size.dim, sublayers)
        end = a.backbone
        norm = NORM.build(a.norm, size.dim) if end.final_norm else None
        final = final_modulation(end.final, size.dim)
        self.out = PatchOutput(a.in_channels, size.dim, size.patch, norm=norm, final=final, zero=end.zero_output)

    @abstractmethod
    def blocks(self) -> None:
        """Make the blocks, each by `block`."""

    @abstractmethod
    def before(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B T D"]:
        """The blocks before the route."""

    @abstractmethod
    def middle(self, tokens: Float[Tensor, "B T D"], p: Pass, *, number: int = 0) -> Float[Tensor, "B Q D"]:
        """The blocks inside route `number`, one of `routing.routes` that share the middle."""

    @abstractmethod
    def after(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B Q D"]:
        """The blocks behind the route."""

    def block(self, place: Place, *, merge: bool = False, raw_residual: bool = True) -> Block:
        """A new block; with `merge`, one that takes in an encoder state."""
        a = self.architecture
        merger = MERGE.build(a.merge, a.size, self.encoding) if merge else None
        return Block(place, a, encoding=self.encoding, fusion=self.text, merge=merger, raw_residual=raw_residual)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`. Where adaLN has no gate to hold sublayers back, their last layers may start at zero instead."""
        blocks = [block for block in self.modules() if isinstance(block, Block)]
        ends = [end for block in blocks for end in block.outputs()] if self.adaln.zero_outputs else []
        return {f"{end}.{leaf}": zeros for end in ends for leaf, _ in self.get_submodule(end).named_parameters()}

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        *,
        route: Route | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """See Backbone. Raises ValueError when the position map is of another grid than the latents."""
        grid = (x.shape[2] // self.patch.patch, x.shape[3] // self.patch.patch)
        tokens, p = self._enter(x, timestep, condition, grid=grid, tap=tap)
        routing, n = self.routing, p.layout.images
        for block in self.mixer:
            tokens = self._call(cast(Block, block), tokens, p)

        outer = tokens
        if routing.enters is Section.before:
            tokens = _leave(tokens, p, routing.kept(route, n))
        tokens = self.before(tokens, p)
        for number in range(routing.routes):
            if routing.enters is Section.middle:
                outer = tokens
                tokens = _leave(tokens, p, routing.kept(route, n, number=number))
            inner = None if routing.skips(route) else self.middle(tokens, p, number=number)
            tokens = self._join(outer, inner, p) if inner is None or routing.returns else inner
        tokens = self.after(tokens, p)[:, : p.layout.images]

        if p.kept is not None:  # removed patches have no prediction
            tokens = self.out.project(tokens, p.whole.time)
            tokens = tokens.new_zeros(len(tokens), n, tokens.shape[2]).scatter(1, p.kept[..., None].expand_as(tokens), tokens)
            return self.out.lay(tokens, grid).to(x.dtype)
        return self.out(tokens, grid, p.whole.time).to(x.dtype)

    def _join(self, outer: Tensor, inner: Tensor | None, p: Pass) -> Tensor:
        index = None if p.index is None or inner is None else p.index[:, : inner.shape[1]]
        p.layout, p.kept, p.index = p.whole, None, None
        return self.routing.join(outer, inner, index)

    def _enter(
        self, x: Tensor, timestep: Tensor, condition: Condition, *, grid: tuple[int, int], tap: Tap | None
    ) -> tuple[Float[Tensor, "B T D"], Pass]:
        """The sequence at the entrance: image tokens and, if they are part of it, text tokens and the time embedding."""
        time = self.time(timestep) + self.aspect(condition.aspect)
        image = self.patches(x, condition.position)
        n = image.shape[1]
        absolute = self.encoding.embed(condition.position)
        if absolute is not None:
            image = image + absolute.to(image.dtype)
        text, mask = self.text(condition)
        learned = self.encoding.embed_text(text.shape[1]) if self.text.joins else None
        if learned is not None:
            text = text + learned.to(text.dtype)
        tokens = torch.cat([image, *([text] if self.text.joins else []), *([time] if self.adaln.as_token else [])], dim=1)

        position = nn.functional.pad(condition.position, (0, 0, 0, tokens.shape[1] - n))  # text lies at (0, 0)
        rotation, halves = self.encoding.rotation(position, n), self.encoding.halves
        whole = Layout(position=position, rotation=rotation, halves=halves, time=time, images=n, grid=grid)
        if not self.text.joins:
            whole.text, whole.text_mask = text, mask
        elif mask is not None:
            whole.mask = nn.functional.pad(mask, (n, tokens.shape[1] - n - mask.shape[1]), value=True)
        return tokens, Pass(layout=whole, whole=whole, modulation=self.adaln(time), tap=tap)

    def unlearned(self, route: Route | None, size: tuple[int, int]) -> Unlearned | None:
        """See Backbone."""
        grid = (size[0] // self.patch.patch, size[1] // self.patch.patch)
        n, weight = grid[0] * grid[1], self.routing.reconstruction
        kept = None if weight is None else self.routing.kept(route, n)
        if weight is None or kept is None:
            return None
        removed = torch.ones(len(kept), n, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
        pixels = removed.view(-1, 1, *grid).repeat_interleave(self.patch.patch, 2).repeat_interleave(self.patch.patch, 3)
        return Unlearned(mask=pixels, patch=self.patch.patch, reconstruction=weight)


def _leave(tokens: Float[Tensor, "B T D"], p: Pass, kept: Int[Tensor, "B K"] | None) -> Float[Tensor, "B S D"]:
    """The kept image tokens and all others; None keeps all."""
    if kept is None:
        return tokens
    rest = torch.arange(p.layout.images, tokens.shape[1], device=kept.device).expand(len(kept), -1)
    p.kept, p.index = kept, torch.cat([kept, rest], dim=1)
    p.layout = p.layout.take(p.index, images=kept.shape[1])
    return tokens.take_along_dim(p.index[..., None], dim=1)
