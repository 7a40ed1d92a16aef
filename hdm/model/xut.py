"""XUT, the Xross-U-Transformer of the HDM report: a U of transformer blocks whose skips are cross-attention.

    latents ─ patches ┐                                        ┌ bypassing tokens ┐
                      ├─ pre (N blocks) ─ route ─ encoder ─ decoder ─ join ─ post (M blocks) ─ patches ─ velocity
    text ──── linear ─┘                             └─ skips ─┘

Encoder group i leaves a state behind; the first block of decoder group i merges one of them (report, "XUT"; spec 1.1). The axes
decide the merge, the modulation, the rest of a block, positions, routing and text fusion; here is only the U.
"""

from dataclasses import dataclass
from enum import Enum
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import BACKBONE
from hdm.config.registry import option
from hdm.config.schema import BackboneConfig, RunConfig
from hdm.model.block import Block, Place
from hdm.model.merge import Pairing
from hdm.model.trunk import Pass, Trunk


class Residual(Enum):
    """What a sublayer's output is added to."""

    raw = "raw"
    normed = "normed"


@dataclass(kw_only=True, slots=True)
class XUTConfig(BackboneConfig):
    """The Xross-U-Transformer of the HDM report."""

    residual: Residual = option(
        Residual.raw, "raw: the stream itself (report's figure); normed: its modulated norm (upstream, spec 1.3 d)"
    )

    def check(self, run: RunConfig) -> None:
        """Refuse a width that the time embedding cannot halve, and routes that would cut the U."""
        from hdm.config.check import require

        require(run.model.dim % 2 == 0, f"model.dim={run.model.dim}: must be even, half of the time embedding is cosine, half sine")
        routes = getattr(run.routing, "routes", 1)
        require(routes == 1, f"routing.routes={routes}: a U has one route, around all of its skips; set 1 or use backbone=dit")


@BACKBONE.register("xut", XUTConfig)
class XUT(Trunk):
    """See XUTConfig."""

    def blocks(self) -> None:
        """See Trunk."""
        size = self.architecture.size
        self.raw = self.architecture.backbone.residual is Residual.raw
        groups = {"encoder": size.enc_blocks, "decoder": size.dec_blocks}
        names = [f"pre.{i}" for i in range(size.pre_depth)]
        names += [f"{group}.{i}.{j}" for group, count in groups.items() for i in range(size.depth) for j in range(count)]
        names += [f"post.{i}" for i in range(size.post_depth)]
        places = {name: Place(name=name, index=i, count=len(names)) for i, name in enumerate(names)}

        def chain(prefix: str, count: int, *, merges: bool = False) -> nn.ModuleList:
            return nn.ModuleList(
                self.block(places[f"{prefix}.{j}"], merge=merges and j == 0, raw_residual=self.raw) for j in range(count)
            )

        self.pre = chain("pre", size.pre_depth)
        self.encoder = nn.ModuleList(chain(f"encoder.{i}", size.enc_blocks) for i in range(size.depth))
        self.decoder = nn.ModuleList(chain(f"decoder.{i}", size.dec_blocks, merges=True) for i in range(size.depth))
        self.post = chain("post", size.post_depth)

    def before(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B T D"]:
        """See Trunk: the pre blocks."""
        return self._chain(self.pre, tokens, p)

    def middle(self, tokens: Float[Tensor, "B T D"], p: Pass, *, number: int = 0) -> Float[Tensor, "B Q D"]:
        """See Trunk: the encoder groups, then the decoder groups, each of which merges one encoder state."""
        states = []
        for group in self.encoder:
            tokens = self._chain(group, tokens, p)
            states.append(tokens)
        if self.architecture.merge.pairing is Pairing.deepest:
            states = [states[-1]] * len(states)
        for group, state in zip(self.decoder, reversed(states)):
            tokens = self._chain(group, tokens, p, state=state)
        return tokens

    def after(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B Q D"]:
        """See Trunk: the post blocks."""
        return self._chain(self.post, tokens, p)

    def _chain(self, blocks: nn.Module, tokens: Tensor, p: Pass, *, state: Tensor | None = None) -> Tensor:
        """The blocks one behind the other; the first one is given the encoder state."""
        for i, block in enumerate(blocks.children()):
            tokens = self.run(cast(Block, block), tokens, p, state=state if i == 0 else None)
        return tokens
