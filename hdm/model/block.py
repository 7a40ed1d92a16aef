"""The transformer block: self-attention, text and merge if it has them, MLP, each inside the adaLN wrapper (spec 1.1).

Where text tokens have weights of their own (text_fusion=mmdit, double), the block has a twin of every part for them, and both
streams meet in one attention (spec 6).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import ATTENTION, MLP, NORM
from hdm.model.adaln import Modulation
from hdm.model.attention import Layout, SelfAttention
from hdm.model.backbone import Architecture
from hdm.model.encoding import Encoding
from hdm.model.joint import TextStream, joint_attention
from hdm.model.merge import Merge
from hdm.model.mlp import Mlp
from hdm.model.norm import Norm
from hdm.model.text_fusion import TextFusion


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """Where a block stands: its path in the network, by which its modulation is found, and its number of `count` in all."""

    name: str
    index: int = 0
    count: int = 1

    @property
    def is_last(self) -> bool:
        """Whether nothing but the output follows."""
        return self.index == self.count - 1


class Block(nn.Module):
    """A block of the stream's width `a.size.dim`."""

    def __init__(
        self,
        place: Place,
        a: Architecture,
        *,
        encoding: Encoding,
        fusion: TextFusion,
        merge: Merge | None = None,
        raw_residual: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.index, self.is_last = place.name, place.index, place.is_last
        self.dim, self.raw_residual = a.size.dim, raw_residual
        self.attn_norm: Norm = NORM.build(a.norm, a.size.dim)
        self.attn: SelfAttention = ATTENTION.build(a.attention, a.size, encoding, index=place.index)
        self.text = fusion.sublayer(a.size, encoding)
        self.text_norm: Norm | None = NORM.build(a.norm, a.size.dim) if self.text is not None and self.text.modulated else None
        self.merge = merge
        self.merge_norm: Norm | None = NORM.build(a.norm, a.size.dim) if merge is not None and merge.modulated else None
        self.mlp_norm: Norm = NORM.build(a.norm, a.size.dim)
        self.mlp: Mlp = MLP.build(a.mlp, a.size)

        self.twin = fusion.has_twin(place.index, place.count)
        self.ends_text = self.twin and place.is_last
        if self.twin:
            self.text_attn_norm: Norm = NORM.build(a.norm, a.size.dim)
            self.text_attn = TextStream(a.attention, a.size, ends=self.ends_text)
        if self.twin and not self.ends_text:
            self.text_mlp_norm: Norm = NORM.build(a.norm, a.size.dim)
            self.text_mlp: Mlp = MLP.build(a.mlp, a.size)

    def sublayers(self) -> list[str]:
        """Names of the sublayers that are modulated; the last part is the kind of sublayer, for adaLN to share by.

        Text enters by cross-attention under the modulation of a merge: XUT's author has one MLP for both (spec 6).
        """
        text = ["text.merge"] if self.text_norm is not None else []
        merge = ["merge"] if self.merge_norm is not None else []
        twin = ["text_attn"] * self.twin + ["text_mlp"] * (self.twin and not self.ends_text)
        return [f"{self.name}.{kind}" for kind in ["attn", *text, *merge, "mlp", *twin]]

    def own(self, modulation: Mapping[str, Modulation | None]) -> dict[str, Modulation | None]:
        """What the block's sublayers have of the network's modulation, by their names within the block: blocks that are alike are
        compiled once."""
        return {name.removeprefix(f"{self.name}."): modulation[name] for name in self.sublayers()}

    def outputs(self) -> list[str]:
        """Names of the linear layers that end the sublayers."""
        parts = [
            "attn",
            *(["text"] if self.text_norm is not None else []),
            *(["merge"] if self.merge_norm is not None else []),
            "mlp",
        ]
        parts += ["text_attn", "text_mlp"] if self.twin and not self.ends_text else []
        return [f"{self.name}.{part}.{getattr(self, part).output}" for part in parts]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        layout: Layout,
        modulation: Mapping[str, Modulation | None],
        *,
        state: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """The new stream; of the last block, its image tokens only. `modulation` is `own` of the network's, `state` the encoder
        state for the merge."""
        only = layout.images if self.is_last else None
        if self.merge is not None and self.merge_norm is None:
            x = self.merge(x, state, layout)
        if self.twin:
            x = self._joint(x, layout, modulation)
        else:
            x = self._wrap(x, self.attn_norm, modulation["attn"], lambda h: self.attn(h, layout, only=only))
        if self.text is not None:
            x = self._read_text(x, layout, modulation)
        if self.merge is not None and self.merge_norm is not None:
            merge = self.merge
            x = self._wrap(x, self.merge_norm, modulation["merge"], lambda h: merge(h, state, layout))
        return self._mlps(x[:, :only], layout, modulation)

    def _read_text(self, x: Float[Tensor, "B T D"], layout: Layout, modulation: Mapping[str, Modulation | None]) -> Tensor:
        text = self.text
        assert text is not None
        if self.text_norm is None:
            return x + text(x, layout)
        return self._wrap(x, self.text_norm, modulation["text.merge"], lambda h: text(h, layout))

    def _joint(self, x: Float[Tensor, "B T D"], layout: Layout, modulation: Mapping[str, Modulation | None]) -> Tensor:
        """One attention over [image, text], each with its own norm, modulation, projections and output."""
        n = layout.images
        image, text = x[:, :n], x[:, n:]
        h, gate = modulated(image, self.attn_norm, modulation["attn"])
        h_text, text_gate = modulated(text, self.text_attn_norm, modulation["text_attn"])
        y, y_text = joint_attention(self.attn, self.text_attn, h, h_text, layout)
        image = self._add(image, h, y, gate)
        return image if y_text is None else torch.cat([image, self._add(text, h_text, y_text, text_gate)], dim=1)

    def _mlps(self, x: Float[Tensor, "B T D"], layout: Layout, modulation: Mapping[str, Modulation | None]) -> Tensor:
        own = modulation["mlp"]
        if not self.twin or self.ends_text or x.shape[1] == layout.images:
            return self._wrap(x, self.mlp_norm, own, lambda h: self.mlp(h, layout))
        image, text = x[:, : layout.images], x[:, layout.images :]
        image = self._wrap(image, self.mlp_norm, own, lambda h: self.mlp(h, layout))
        text = self._wrap(text, self.text_mlp_norm, modulation["text_mlp"], lambda h: self.text_mlp(h, layout))
        return torch.cat([image, text], dim=1)

    def _wrap(
        self, x: Float[Tensor, "B T D"], norm: Norm, modulation: Modulation | None, f: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B Q D"]:
        """adaLN: x + gate * f(h), h = norm(x) * (1 + scale) + shift. Without the raw residual, h + gate * f(h) (spec 1.3 d)."""
        h, gate = modulated(x, norm, modulation)
        return self._add(x, h, f(h), gate)

    def _add(self, x: Tensor, h: Tensor, y: Tensor, gate: Tensor | None) -> Float[Tensor, "B Q D"]:
        residual = (x if self.raw_residual else h)[:, : y.shape[1]]
        return residual + (y if gate is None else gate * y)


def modulated(x: Float[Tensor, "B T D"], norm: Norm, modulation: Modulation | None) -> tuple[Tensor, Tensor | None]:
    """norm(x) * (1 + scale) + shift, and the gate."""
    h = norm(x)
    if modulation is None:
        return h, None
    scale, shift, gate = modulation
    return (h * (1 + scale) if shift is None else h * (1 + scale) + shift), gate
