"""The transformer block of XUT: self-attention, merge if it has one, MLP, each inside the adaLN wrapper (spec 1.1)."""

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import ATTENTION, MLP, NORM
from hdm.model.adaln import Modulation
from hdm.model.attention import Layout, SelfAttention
from hdm.model.backbone import Architecture
from hdm.model.encoding import Encoding
from hdm.model.merge import Merge
from hdm.model.mlp import Mlp
from hdm.model.norm import Norm


class Block(nn.Module):
    """A block; `name` is its path in the network, by which its modulation is found."""

    def __init__(
        self, name: str, a: Architecture, encoding: Encoding, *, merge: Merge | None = None, raw_residual: bool = True
    ) -> None:
        super().__init__()
        self.name, self.raw_residual = name, raw_residual
        self.attn_norm: Norm = NORM.build(a.norm, a.size.dim)
        self.attn: SelfAttention = ATTENTION.build(a.attention, a.size, encoding)
        self.merge = merge
        self.merge_norm: Norm | None = NORM.build(a.norm, a.size.dim) if merge is not None and merge.modulated else None
        self.mlp_norm: Norm = NORM.build(a.norm, a.size.dim)
        self.mlp: Mlp = MLP.build(a.mlp, a.size)
        self.kinds = ["attn", "mlp"] if self.merge_norm is None else ["attn", "merge", "mlp"]

    def sublayers(self) -> list[str]:
        """Names of the sublayers that are modulated."""
        return [f"{self.name}.{kind}" for kind in self.kinds]

    def outputs(self) -> list[str]:
        """Names of the linear layers that end them."""
        return [f"{self.name}.{kind}.{getattr(self, kind).output}" for kind in self.kinds]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        layout: Layout,
        modulation: Mapping[str, Modulation | None],
        *,
        state: Float[Tensor, "B T D"] | None = None,
        only: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """The new stream. `state` is the encoder state for the merge; with `only`, no more than the first `only` tokens return."""
        if self.merge is not None and self.merge_norm is None:
            x = self.merge(x, state, layout)
        x = self._wrap(x, self.attn_norm, modulation[f"{self.name}.attn"], lambda h: self.attn(h, layout, only=only))
        if self.merge is not None and self.merge_norm is not None:
            merge = self.merge
            x = self._wrap(x, self.merge_norm, modulation[f"{self.name}.merge"], lambda h: merge(h, state, layout))
        return self._wrap(x, self.mlp_norm, modulation[f"{self.name}.mlp"], lambda h: self.mlp(h, layout))

    def _wrap(
        self, x: Float[Tensor, "B T D"], norm: Norm, modulation: Modulation | None, f: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B Q D"]:
        """adaLN: x + gate * f(h), h = norm(x) * (1 + scale) + shift. Without the raw residual, h + gate * f(h) (spec 1.3 d)."""
        h, gate = norm(x), None
        if modulation is not None:
            scale, shift, gate = modulation
            h = h * (1 + scale) if shift is None else h * (1 + scale) + shift
        y = f(h)
        residual = (x if self.raw_residual else h)[:, : y.shape[1]]
        return residual + (y if gate is None else gate * y)
