"""Backbones without skips: one stack of blocks. DiT, MMDiT and SANA differ in their blocks, which the other axes describe.

What each published system has on those axes is data, `implies`; any of it can be overridden. The entrance (patches, time and aspect
embedding) is the laboratory's own for every backbone, so that arms differ in what is compared.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import BACKBONE
from hdm.config.registry import option
from hdm.config.schema import BackboneConfig, Final, ModelConfig, RunConfig
from hdm.model.block import Block, Place
from hdm.model.trunk import Pass, Trunk


@dataclass(kw_only=True, slots=True)
class PlainConfig(BackboneConfig):
    """What all plain stacks have in common."""

    takes: ClassVar[dict[str, str]] = {"skips": "a plain stack has no encoder states"}

    blocks: int | None = option(None, "blocks in all; null: as many as XUT has at these sizes")

    def check(self, run: RunConfig) -> None:
        """Refuse a stack that is shorter than its unrouted ends, or too short for its routes."""
        from hdm.config.check import require

        count, ends = self.count(run.model), run.model.pre_depth + run.model.post_depth
        routes = getattr(run.routing, "routes", 1)
        require(
            count >= ends + routes,
            f"backbone.blocks={count}: leaves no block to each of {routes} routes between model.pre_depth + model.post_depth ="
            f" {ends} others; set {ends + routes} or more, or fewer routes",
        )

    def count(self, size: ModelConfig) -> int:
        """The number of blocks."""
        return size.blocks if self.blocks is None else self.blocks


@dataclass(kw_only=True, slots=True)
class DitConfig(PlainConfig):
    """A plain stack with adaLN-Zero, text by cross-attention (DiT: Peebles & Xie, 2023; text as in PixArt: Chen et al., 2023)."""

    implies: ClassVar[dict[str, str]] = {
        "merge": "none", "adaln": "per_layer", "adaln.gate": "zero", "adaln.activation": "silu",
        "norm": "layer", "norm.affine": "false",
        "attention": "full",
        "attention.qkv_bias": "true", "mlp": "gelu", "encoding": "sincos_abs", "text_fusion": "cross_attn",
    }  # fmt: skip

    final_norm: bool = option(True, "a norm, of the norm axis, before the output layer")
    final: Final = option(Final.adaln, "modulation behind that norm: none (XUT), adaln (DiT) or table (PixArt)")
    zero_output: bool = option(True, "the output layer starts at zero (DiT); false: at std 1/dim^2 (XUT)")


@dataclass(kw_only=True, slots=True)
class MmditConfig(PlainConfig):
    """Two streams with weights of their own and one attention over both, adaLN-Zero (SD3's MMDiT: Esser et al., 2024)."""

    implies: ClassVar[dict[str, str]] = {
        "merge": "none", "adaln": "per_layer", "adaln.gate": "zero", "adaln.activation": "silu",
        "norm": "layer", "norm.affine": "false",
        "attention": "full",
        "attention.qkv_bias": "true", "attention.qk_norm": "rms", "mlp": "gelu", "encoding": "sincos_abs", "text_fusion": "mmdit",
    }  # fmt: skip

    final_norm: bool = option(True, "a norm, of the norm axis, before the output layer")
    final: Final = option(Final.adaln, "modulation behind that norm: none (XUT), adaln (DiT) or table (PixArt)")
    zero_output: bool = option(True, "the output layer starts at zero (DiT); false: at std 1/dim^2 (XUT)")


@dataclass(kw_only=True, slots=True)
class SanaConfig(PlainConfig):
    """Linear attention and Mix-FFN, whose convolution supplies the positions; adaLN-single (SANA: Xie et al., 2024).

    The Mix-FFN is model.mlp_dim wide, so that sizes can be matched; published is mlp.ratio=2.5.
    """

    implies: ClassVar[dict[str, str]] = {
        "merge": "none", "adaln": "single", "adaln.gate": "zero",
        "norm": "layer", "norm.affine": "false", "attention": "linear", "mlp": "mix_ffn",
        "mlp.ratio": "null",

        "encoding": "nope", "text_fusion": "cross_attn", "text_fusion.norm": "true", "routing": "none",
    }  # fmt: skip

    final_norm: bool = option(True, "a norm, of the norm axis, before the output layer")
    final: Final = option(Final.table, "modulation behind that norm: none (XUT), adaln (DiT) or table (PixArt)")


class Plain(Trunk):
    """Blocks one behind the other; the first `pre_depth` and the last `post_depth` are never routed."""

    def blocks(self) -> None:
        """See Trunk."""
        size = self.architecture.size
        count = self.architecture.backbone.count(size)
        self.stack = nn.ModuleList(self.block(Place(name=f"stack.{i}", index=i, count=count)) for i in range(count))
        self.ends = (size.pre_depth, count - size.post_depth)

    def before(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B T D"]:
        """See Trunk."""
        return self._chain(range(self.ends[0]), tokens, p)

    def middle(self, tokens: Float[Tensor, "B T D"], p: Pass, *, number: int = 0) -> Float[Tensor, "B Q D"]:
        """See Trunk."""
        (first, last), routes = self.ends, self.routing.routes
        borders = [first + (last - first) * i // routes for i in range(routes + 1)]
        return self._chain(range(borders[number], borders[number + 1]), tokens, p)

    def after(self, tokens: Float[Tensor, "B T D"], p: Pass) -> Float[Tensor, "B Q D"]:
        """See Trunk."""
        return self._chain(range(self.ends[1], len(self.stack)), tokens, p)

    def _chain(self, numbers: range, tokens: Tensor, p: Pass) -> Tensor:
        for i in numbers:
            tokens = self.run(cast(Block, self.stack[i]), tokens, p)
        return tokens


@BACKBONE.register("dit", DitConfig)
class Dit(Plain):
    """See DitConfig."""


@BACKBONE.register("mmdit", MmditConfig)
class Mmdit(Plain):
    """See MmditConfig."""


@BACKBONE.register("sana", SanaConfig)
class Sana(Plain):
    """See SanaConfig."""
