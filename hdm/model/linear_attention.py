"""Linear attention: keys and values are summed once, and every query reads the sum (SANA, Xie et al., 2024; spec 7).

Shapes: B images, T tokens (Q of them as queries), H heads, D channels, C channels per head.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hdm.config.axes import ATTENTION
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, QKNorm, RunConfig
from hdm.model.attention import Layout, SelfAttention, merge_heads, rotate, split_heads
from hdm.model.encoding import Encoding
from hdm.model.norm import RmsConfig, RMSNorm


@dataclass(kw_only=True, slots=True)
class LinearConfig:
    """relu(q) (sum of relu(k) v) / (relu(q) sum of relu(k)), at a cost that is linear in the tokens (SANA, Xie et al., 2024)."""

    takes: ClassVar[dict[str, str]] = {"joint": "it has one set of projections"}

    head_dim: int = option(32, "channels per head of this attention; its heads are model.dim / head_dim")
    qk_norm: QKNorm = option(QKNorm.none, "norm of q and k over all channels, before the ReLU: none (SANA) or rms (SANA 1.5)")

    def check(self, run: RunConfig) -> None:
        """Refuse heads that do not add up to the width, and norms that no published linear attention has."""
        from hdm.config.check import require

        require(
            self.head_dim > 0 and run.model.dim % self.head_dim == 0,
            f"attention.head_dim={self.head_dim}: does not divide model.dim={run.model.dim}; choose a divisor, such as 32",
        )
        require(
            self.qk_norm in (QKNorm.none, QKNorm.rms),
            f"attention.qk_norm={self.qk_norm.value}: attention=linear takes none or rms",
        )


@ATTENTION.register("linear", LinearConfig)
class Linear(SelfAttention):
    """Sums in fp32 or better; qkv without and out with a bias.

    Positions enter as in RoFormer's linear form (Su et al., 2021): relu(q) and relu(k) turn in the numerator, the denominator keeps
    them as they are and so stays positive. Channels turn as in full attention, in heads of model.head_dim, of which the heads here
    are parts: at encoding.fraction = 0.5 half of them know positions.
    """

    def __init__(self, config: LinearConfig, size: ModelConfig, encoding: Encoding, *, index: int = 0) -> None:
        super().__init__(size, encoding, qk_norm=QKNorm.none)
        self.inner = max(1, size.dim // config.head_dim)  # outer levels of hdit may be narrower than a head
        if config.qk_norm is QKNorm.rms:
            self.q_norm, self.k_norm = RMSNorm(RmsConfig(), size.dim), RMSNorm(RmsConfig(), size.dim)
        self.normed = config.qk_norm is QKNorm.rms

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout, *, only: int | None = None) -> Float[Tensor, "B Q D"]:
        """See SelfAttention."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q[:, :only]
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        # The meta device, on which FLOPs are counted, knows no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            mixed = self._read(F.relu(q), F.relu(k), v, layout)
        return self.out(mixed.to(v.dtype))

    def _read(
        self, q: Float[Tensor, "B Q D"], k: Float[Tensor, "B T D"], v: Float[Tensor, "B T D"], layout: Layout
    ) -> Float[Tensor, "B Q D"]:
        """What non-negative queries read of the values. Padding adds to no sum."""
        q, k, v = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, k, v))
        if layout.mask is not None:
            k = k * layout.mask[..., None]
        total = split_heads(q, self.inner) @ split_heads(k.sum(dim=1, keepdim=True), self.inner).mT
        q, k = (split_heads(self._turned(part, layout), self.inner) for part in (q, k))
        return merge_heads(q @ (k.mT @ split_heads(v, self.inner)) / (total + 1e-8))

    def _turned(self, x: Float[Tensor, "B Q D"], layout: Layout) -> Float[Tensor, "B Q D"]:
        rotation = layout.rotation if self.rope is None else self.rope(layout.position)
        return x if rotation is None else merge_heads(rotate(split_heads(x, self.heads), rotation, halves=layout.halves))
