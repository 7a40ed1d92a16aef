"""XUT, the Xross-U-Transformer of the HDM report: a U of transformer blocks whose skips are cross-attention.

    latents ─ patches ┐                                        ┌ bypassing tokens ┐
                      ├─ pre (N blocks) ─ route ─ encoder ─ decoder ─ join ─ post (M blocks) ─ patches ─ velocity
    text ──── linear ─┘                             └─ skips ─┘

Tokens are [image, text] all the way. Encoder group i leaves a state behind; the first block of decoder group i merges one of them
(report, "XUT"; spec 1.1). The axes decide the merge, the modulation, the rest of a block, positions, routing and text fusion;
here is only the U.

Shapes: B images, N image tokens, L text tokens, T = N + L (+ 1 with a time token), D width, K kept tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdm.config.axes import ADALN, BACKBONE, ENCODING, MERGE, POSITION, ROUTING, TEXT_FUSION
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.adaln import Modulation
from hdm.model.attention import Layout
from hdm.model.backbone import Architecture, Backbone, Condition, Route, Tap
from hdm.model.block import Block
from hdm.model.embed import AspectEmbed, PatchEmbed, PatchOutput, TimeEmbed
from hdm.model.init import Init, materialize, zeros
from hdm.model.merge import Pairing


class Residual(Enum):
    """What a sublayer's output is added to."""

    raw = "raw"
    normed = "normed"


@dataclass(kw_only=True, slots=True)
class XUTConfig:
    """The Xross-U-Transformer of the HDM report."""

    residual: Residual = option(
        Residual.raw, "raw: the stream itself (report's figure); normed: its modulated norm (upstream, spec 1.3 d)"
    )

    def check(self, run: RunConfig) -> None:
        """Refuse a width that the time embedding cannot halve."""
        from hdm.config.check import require

        require(run.model.dim % 2 == 0, f"model.dim={run.model.dim}: must be even, half of the time embedding is cosine, half sine")


@BACKBONE.register("xut", XUTConfig)
class XUT(Backbone):
    """XUT of an `Architecture`, with the initial values of `seed`; under `torch.device("meta")` it takes no memory and has none."""

    def __init__(self, architecture: Architecture, *, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        device = torch.get_default_device()
        with torch.device("meta"):
            self._build(architecture)
        if device.type != "meta":
            materialize(self, device, seed)

    def _build(self, a: Architecture) -> None:
        size = a.size
        self.patch = PatchEmbed(a.in_channels, size.dim, size.patch)
        self.time = TimeEmbed(size.dim)
        self.aspect = AspectEmbed(size.dim)
        self.text = TEXT_FUSION.build(a.text_fusion, a.context_dim, size.dim)
        self.position = POSITION.build(a.position)
        self.encoding = ENCODING.build(a.encoding, size, self.position.square)
        self.routing = ROUTING.build(a.routing)

        self.pre = nn.ModuleList(self._block(f"pre.{i}") for i in range(size.pre_depth))
        self.encoder = nn.ModuleList(
            nn.ModuleList(self._block(f"encoder.{i}.{j}") for j in range(size.enc_blocks)) for i in range(size.depth)
        )
        self.decoder = nn.ModuleList(
            nn.ModuleList(self._block(f"decoder.{i}.{j}", merge=j == 0) for j in range(size.dec_blocks)) for i in range(size.depth)
        )
        self.post = nn.ModuleList(self._block(f"post.{i}") for i in range(size.post_depth))

        sublayers = [name for block in self.modules() if isinstance(block, Block) for name in block.sublayers()]
        self.adaln = ADALN.build(a.adaln, size.dim, sublayers)
        self.out = PatchOutput(a.in_channels, size.dim, size.patch)

    def _block(self, name: str, *, merge: bool = False) -> Block:
        a = self.architecture
        raw = a.backbone.residual is Residual.raw
        merger = MERGE.build(a.merge, a.size, self.encoding) if merge else None
        return Block(name, a, self.encoding, merge=merger, raw_residual=raw)

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
        time = self.time(timestep) + self.aspect(condition.aspect)
        modulation = self.adaln(time)
        tokens, layout = self._tokens(x, time, condition)
        n, numbers = grid[0] * grid[1], count(1)

        def behind(tokens: Float[Tensor, "B T D"], kept: Int[Tensor, "B K"] | None = None) -> None:
            """A block has given `tokens`."""
            if tap is not None and next(numbers) == tap.depth:
                tap.tokens, tap.kept = tokens[:, : n if kept is None else kept.shape[1]], kept

        for block in self.pre:
            tokens = self._run(block, tokens, layout, modulation)
            behind(tokens)

        kept = self.routing.kept(route, n)
        if kept is None:
            tokens = self._u(tokens, layout, modulation, behind)
        else:
            rest = torch.arange(n, tokens.shape[1], device=kept.device).expand(len(kept), -1)
            index = torch.cat([kept, rest], dim=1)
            inner = tokens.take_along_dim(index[..., None], dim=1)
            inner = self._u(inner, layout.take(index), modulation, lambda tokens: behind(tokens, kept))
            tokens = tokens.scatter(1, index[..., None].expand_as(inner), inner.to(tokens.dtype))

        for i, block in enumerate(self.post):
            is_last = i == len(self.post) - 1
            tokens = self._run(block, tokens, layout, modulation, only=n if is_last else None)
            behind(tokens)
        return self.out(tokens[:, :n], grid).to(x.dtype)

    def _u(
        self,
        tokens: Float[Tensor, "B K D"],
        layout: Layout,
        modulation: Mapping[str, Modulation | None],
        behind: Callable[[Tensor], None],
    ) -> Float[Tensor, "B K D"]:
        """The encoder groups, then the decoder groups, each of which merges one encoder state. `behind` sees every output."""
        states = []
        for group in self.encoder:
            for block in group.children():
                tokens = self._run(block, tokens, layout, modulation)
                behind(tokens)
            states.append(tokens)

        if self.architecture.merge.pairing is Pairing.deepest:
            states = [states[-1]] * len(states)
        for group, state in zip(self.decoder, reversed(states)):
            for j, block in enumerate(group.children()):
                tokens = self._run(block, tokens, layout, modulation, state=state if j == 0 else None)
                behind(tokens)
        return tokens

    def _tokens(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B 1 D"], condition: Condition
    ) -> tuple[Float[Tensor, "B T D"], Layout]:
        """The sequence at the entrance: image tokens, text tokens and, without adaLN, the time embedding."""
        image = self.patch(x)
        if condition.position.shape[1] != image.shape[1]:
            raise ValueError(
                f"{condition.position.shape[1]} positions for {image.shape[1]} image tokens; make them by position_map(view, grid)"
            )
        absolute = self.encoding.embed(condition.position)
        if absolute is not None:
            image = image + absolute.to(image.dtype)
        text, mask = self.text(condition)
        tokens = torch.cat([image, text, time], dim=1) if self.adaln.as_token else torch.cat([image, text], dim=1)

        after = tokens.shape[1] - image.shape[1]
        position = nn.functional.pad(condition.position, (0, 0, 0, after))  # text lies at (0, 0)
        if mask is not None:
            is_time = tokens.shape[1] - image.shape[1] - mask.shape[1]
            mask = nn.functional.pad(mask, (image.shape[1], is_time), value=True)
        return tokens, Layout(position=position, rotation=self.encoding.rotation(position), mask=mask)

    def _run(self, block: nn.Module, tokens: Float[Tensor, "B T D"], *args: Any, **kwargs: Any) -> Float[Tensor, "B Q D"]:
        if self.architecture.size.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return block(tokens, *args, **kwargs)

    def tap_width(self, depth: int) -> int:
        """See Backbone."""
        blocks = sum(isinstance(module, Block) for module in self.modules())
        if not 1 <= depth <= blocks:
            raise ValueError(f"the backbone has {blocks} blocks; choose 1 to {blocks}")
        return self.architecture.size.dim

    def position_map(self, view: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B N 2"]:
        """See Backbone."""
        return self.position(view, grid)
