"""The attention axis: how the tokens of a block attend to each other; and cross-attention, and what both must know of the tokens.

Shapes: B images, T tokens (S of them as keys), H heads, D channels, P rotated channel pairs per head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from hdm.config.axes import ATTENTION
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, QKNorm
from hdm.model.encoding import Encoding
from hdm.model.init import Init, constant
from hdm.model.norm import LayerConfig, LayerNorm, RmsConfig, RMSNorm


@dataclass(kw_only=True, slots=True)
class FullConfig:
    """Every token attends to every token (XUT)."""

    qk_norm: QKNorm = option(
        QKNorm.none, "norm of each head's queries and keys: none (XUT), rms (SD3), layer (ViT-22B) or cosine (HDiT)"
    )
    qkv_bias: bool = option(False, "biases on queries, keys and values: none in XUT, some in DiT and SD3")


@dataclass(kw_only=True, slots=True)
class Layout:
    """Where tokens are, and which of them are real.

    `rotation` holds exp(i angle) for the first 2P channels of each head, shared by all layers; None when the encoding rotates
    nothing, or each layer has its own frequencies; with `halves` a pair is (i, i + P). `mask` is False for padding, which no token
    attends to; None: there is none.
    The first `images` tokens are image tokens, row by row of `grid` (rows, columns), which is None when some are missing. Text that
    is no part of the sequence is in `text`, and `time` is the time embedding.
    """

    position: Float[Tensor, "B T 2"]
    rotation: Complex[Tensor, "B H T P"] | None = None
    mask: Bool[Tensor, "B T"] | None = None
    halves: bool = False
    time: Float[Tensor, "B 1 E"] | None = None
    images: int = 0
    grid: tuple[int, int] | None = None
    text: Float[Tensor, "B L C"] | None = None
    text_mask: Bool[Tensor, "B L"] | None = None

    def take(self, index: Int[Tensor, "B K"], *, images: int = 0) -> "Layout":
        """The layout of some of the tokens, the first `images` of them image tokens, which are no grid any more."""
        return Layout(
            halves=self.halves,
            time=self.time,
            images=images,
            text=self.text,
            text_mask=self.text_mask,
            position=self.position.take_along_dim(index[..., None], dim=1),
            rotation=None if self.rotation is None else self.rotation.take_along_dim(index[:, None, :, None], dim=2),
            mask=None if self.mask is None else self.mask.take_along_dim(index, dim=1),
        )


class NormPair(nn.Module):
    """A learned norm over the channels of a head for queries and one for keys; all heads share them (SD3, Esser et al., 2024)."""

    scale = None

    def __init__(self, q: RMSNorm | LayerNorm, k: RMSNorm | LayerNorm, *, dim: int) -> None:
        super().__init__()
        self.q: nn.Module = q
        self.k, self.dim = k, dim

    def without_queries(self) -> None:
        """Keep no weights for queries that nobody asks."""
        self.q = nn.Identity()

    def fan_in(self) -> dict[str, int]:
        """See `hdm.train.optimizer`. What all heads share stands for D gains."""
        return {name: self.dim for name, _ in self.named_parameters()}

    def forward(self, q: Float[Tensor, "B H T C"], k: Float[Tensor, "B H S C"]) -> tuple[Tensor, Tensor]:
        """The normed queries and keys."""
        return self.q(q), self.k(k)


class Cosine(nn.Module):
    """Logits scale · cos(q, k), with one learned scale per head from 10 (HDiT, Crowson et al., 2024; spec 7).

    HDiT gives sqrt(scale) to each side. Here the queries take all of it: the same logits, and no root of a negative number.
    """

    scale = 1.0

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        self.dim = size.dim
        self.logit_scale: nn.Parameter | None = nn.Parameter(torch.empty(size.heads))

    def without_queries(self) -> None:
        """Keep no weights for queries that nobody asks."""
        self.logit_scale = None

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {} if self.logit_scale is None else {"logit_scale": constant(10.0)}

    def fan_in(self) -> dict[str, int]:
        """See `hdm.train.optimizer`. The scalars stand for gains of D channels; by their shape they would move by lr/H a step."""
        return {} if self.logit_scale is None else {"logit_scale": self.dim}

    def forward(self, q: Float[Tensor, "B H T C"], k: Float[Tensor, "B H S C"]) -> tuple[Tensor, Tensor]:
        """Keys of length 1 and queries of length `logit_scale`, in fp32 or better."""
        return _unit(q) * (1.0 if self.logit_scale is None else self.logit_scale[:, None, None]), _unit(k)


def _unit(x: Float[Tensor, "B H T C"]) -> Float[Tensor, "B H T C"]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """What self- and cross-attention share: heads, QK-norm, rotary encoding, and `output`, the linear layer that ends them."""

    output = "out"

    def __init__(self, size: ModelConfig, *, rope: nn.Module | None, qk_norm: QKNorm) -> None:
        super().__init__()
        self.heads, self.rope = size.heads, rope
        self.qk_norm = make_qk_norm(qk_norm, size)

    @property
    def scale(self) -> float | None:
        """What logits are multiplied by; None is 1/sqrt(head_dim)."""
        return None if self.qk_norm is None else self.qk_norm.scale

    def sides(
        self, q: Float[Tensor, "B Q D"], k: Float[Tensor, "B T D"], v: Float[Tensor, "B T D"], layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries, keys and values (B H T C), the first two normed and turned; queries may be the first tokens only."""
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        rotation = layout.rotation if self.rope is None else self.rope(layout.position)
        return rotate(q, rotation, halves=layout.halves), rotate(k, rotation, halves=layout.halves), v

    def read(
        self, q: Float[Tensor, "B Q D"], k: Float[Tensor, "B T D"], v: Float[Tensor, "B T D"], layout: Layout
    ) -> Float[Tensor, "B Q D"]:
        """What the queries, which may be the first of the tokens only, read of the values."""
        q, k, v = self.sides(q, k, v, layout)
        return merge_heads(attend(q, k, v, layout.mask, scale=self.scale))


class SelfAttention(Attention):
    """Attention among the tokens of one sequence. A variant is built with `index`, the number of its block in the forward order."""

    def __init__(self, size: ModelConfig, encoding: Encoding, *, qk_norm: QKNorm, qkv_bias: bool = False) -> None:
        super().__init__(size, rope=encoding.per_layer(), qk_norm=qk_norm)
        self.qkv = nn.Linear(size.dim, 3 * size.dim, bias=qkv_bias)
        self.out = nn.Linear(size.dim, size.dim)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"qkv.weight": 3}

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout, *, only: int | None = None) -> Float[Tensor, "B Q D"]:
        """Attend among all tokens; with `only`, return the first `only` of them."""
        raise NotImplementedError


@ATTENTION.register("full", FullConfig)
class Full(SelfAttention):
    """softmax(q k / sqrt(head_dim)) v, qkv without and out with a bias (spec 1.2)."""

    def __init__(self, config: FullConfig, size: ModelConfig, encoding: Encoding, *, index: int = 0) -> None:
        super().__init__(size, encoding, qk_norm=config.qk_norm, qkv_bias=config.qkv_bias)

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout, *, only: int | None = None) -> Float[Tensor, "B Q D"]:
        """See SelfAttention."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(self.read(q[:, :only], k, v, layout))


class CrossAttention(Attention):
    """Attention from one state of the tokens to another, with rotary encoding on both sides (spec 1.2)."""

    def __init__(self, size: ModelConfig, *, rope: nn.Module | None = None, qk_norm: QKNorm = QKNorm.none) -> None:
        super().__init__(size, rope=rope, qk_norm=qk_norm)
        self.q = nn.Linear(size.dim, size.dim, bias=False)
        self.kv = nn.Linear(size.dim, 2 * size.dim, bias=False)
        self.out = nn.Linear(size.dim, size.dim)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"kv.weight": 2}

    def forward(self, x: Float[Tensor, "B Q D"], state: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B Q D"]:
        """Queries from `x`, keys and values from `state`; both lie as `layout` says."""
        k, v = self.kv(state).chunk(2, dim=-1)
        return self.out(self.read(self.q(x), k, v, layout))


def rotate(
    x: Float[Tensor, "B H T C"], rotation: Complex[Tensor, "B H S P"] | None, *, halves: bool = False
) -> Float[Tensor, "B H T C"]:
    """Multiply the channel pairs (0, 1), (2, 3) … of `x`, as complex numbers, by `rotation`, which may be longer; the rest passes.

    With `halves` the pairs are (0, P), (1, P + 1) … of the first 2P channels. The result has the precision of `rotation`. One
    complex product is two to four times faster than sines and cosines apart; compiled it is real arithmetic, for which alone
    torch.compile makes code.
    """
    if rotation is None:
        return x
    turned = 2 * rotation.shape[-1]
    head, rest = x[..., :turned].to(rotation.real.dtype), x[..., turned:].to(rotation.real.dtype)
    rotation = rotation[:, :, : x.shape[2]]
    if torch.compiler.is_compiling():
        a, b = head.chunk(2, dim=-1) if halves else (head[..., 0::2], head[..., 1::2])
        cos, sin = rotation.real, rotation.imag
        turn = torch.cat if halves else torch.stack
        return torch.cat([turn([a * cos - b * sin, a * sin + b * cos], dim=-1).reshape(head.shape), rest], dim=-1)
    if halves:
        product = torch.complex(*head.chunk(2, dim=-1)) * rotation
        return torch.cat([product.real, product.imag, rest], dim=-1)
    pairs = torch.view_as_complex(head.reshape(*x.shape[:-1], -1, 2))
    return torch.cat([torch.view_as_real(pairs * rotation).flatten(-2), rest], dim=-1)


def attend(
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B H S C"],
    v: Float[Tensor, "B H S C"],
    mask: Bool[Tensor, "B S"] | Bool[Tensor, "#B T S"] | None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H T C"]:
    """Softmax attention over the keys that `mask` calls real, in the dtype of `v`; `scale` None is 1/sqrt(C).

    A mask of three axes says it for each query; its first axis may be 1.
    """
    bias = mask
    if mask is not None:
        bias = mask[:, None] if mask.ndim == 3 else mask[:, None, None, :]
    if v.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # bf16 attention is slower than fp32 there
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias, scale=scale).to(v.dtype)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, bias, scale=scale)


def make_qk_norm(kind: QKNorm, size: ModelConfig) -> NormPair | Cosine | None:
    """A new QK-norm of `kind` for one attention layer."""
    match kind:
        case QKNorm.none:
            return None
        case QKNorm.rms:
            return NormPair(RMSNorm(RmsConfig(), size.head_dim), RMSNorm(RmsConfig(), size.head_dim), dim=size.dim)
        case QKNorm.layer:
            return NormPair(LayerNorm(LayerConfig(), size.head_dim), LayerNorm(LayerConfig(), size.head_dim), dim=size.dim)
        case QKNorm.cosine:
            return Cosine(size)


def split_heads(x: Float[Tensor, "B T D"], heads: int) -> Float[Tensor, "B H T C"]:
    """Head h takes the h-th run of D / heads channels."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T C"]) -> Float[Tensor, "B T D"]:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)
