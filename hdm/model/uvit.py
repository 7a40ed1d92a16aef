"""U-ViT (Bao et al., 2023): as many blocks before the middle one as behind it, each pair joined by a long skip."""

from dataclasses import dataclass
from typing import ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import BACKBONE
from hdm.config.registry import option
from hdm.config.schema import BackboneConfig, ModelConfig, RunConfig
from hdm.model.block import Block, Place
from hdm.model.trunk import Pass, Trunk


@dataclass(kw_only=True, slots=True)
class UvitConfig(BackboneConfig):
    """Each block of the second half merges its mirror in the first; time and text are tokens (U-ViT, Bao et al., 2023).

    The outer `model.pre_depth` pairs of blocks are never routed, so that the two ends of each skip see the same tokens.
    """

    implies: ClassVar[dict[str, str]] = {
        "merge": "concat", "adaln": "none", "norm": "layer", "attention": "full", "mlp": "gelu", "encoding": "learned_abs",
        "text_fusion": "concat",
    }  # fmt: skip
    takes: ClassVar[dict[str, str]] = {"free_decoder": "its last blocks merge states of the first, of the same tokens"}

    final_norm: bool = option(True, "a norm, of the norm axis, before the output layer")
    blocks: int | None = option(None, "blocks in all, an odd number; null: as many as XUT has at these sizes, made odd")

    def check(self, run: RunConfig) -> None:
        """Refuse an even number of blocks, and what its skips do not allow."""
        from hdm.config.check import require

        count, routes = self.count(run.model), getattr(run.routing, "routes", 1)
        require(count % 2 == 1 and count > 0, f"backbone.blocks={count}: must be odd, two halves and a middle; use {count + 1}")
        require(
            run.merge.pairing.name == "mirror",
            f"merge.pairing={run.merge.pairing.name}: backbone=uvit pairs mirrored blocks; use mirror, or backbone=xut",
        )
        require(routes == 1, f"routing.routes={routes}: a U has one route, around all of its skips; set 1 or use backbone=dit")

    def count(self, size: ModelConfig) -> int:
        """The number of blocks."""
        return size.blocks // 2 * 2 + 1 if self.blocks is None else self.blocks


@BACKBONE.register("uvit", UvitConfig)
class UViT(Trunk):
    """See UvitConfig."""

    def blocks(self) -> None:
        """See Trunk."""
        size = self.architecture.size
        count = self.architecture.backbone.count(size)
        half = count // 2
        self.outer = min(size.pre_depth, half)
        self.in_blocks = nn.ModuleList(self.block(Place(name=f"in_blocks.{i}", index=i, count=count)) for i in range(half))
        self.mid = self.block(Place(name="mid", index=half, count=count))
        self.out_blocks = nn.ModuleList(
            self.block(Place(name=f"out_blocks.{i}", index=half + 1 + i, count=count), merge=True) for i in range(half)
        )

    def before(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B T D"]:
        """See Trunk."""
        return self._down(range(self.outer), tokens, p)

    def middle(self, tokens: Float[Tensor, "B T D"], p: Pass, *, number: int = 0) -> Float[Tensor, "B Q D"]:
        """See Trunk."""
        half = len(self.in_blocks)
        tokens = self._down(range(self.outer, half), tokens, p)
        tokens = self.run(self.mid, tokens, p)
        return self._up(range(half - self.outer), tokens, p)

    def after(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B Q D"]:
        """See Trunk."""
        half = len(self.in_blocks)
        return self._up(range(half - self.outer, half), tokens, p)

    def _down(self, numbers: range, tokens: Tensor, p: Pass) -> Tensor:
        for i in numbers:
            tokens = self.run(cast(Block, self.in_blocks[i]), tokens, p)
            p.states.append(tokens)
        return tokens

    def _up(self, numbers: range, tokens: Tensor, p: Pass) -> Tensor:
        """Each block merges the newest state that is left."""
        for i in numbers:
            tokens = self.run(cast(Block, self.out_blocks[i]), tokens, p, state=p.states.pop())
        return tokens
