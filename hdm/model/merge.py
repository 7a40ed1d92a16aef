"""The merge axis: how a decoder group takes in its encoder state.

The first block of each decoder group merges x, the stream, with s, an encoder state. A merge that is `modulated` is a sublayer of
its own between self-attention and MLP, inside the adaLN wrapper; the others replace x at the block's entrance (spec 2).
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import MERGE
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, QKNorm, RunConfig
from hdm.model.attention import CrossAttention, Layout
from hdm.model.encoding import Encoding
from hdm.model.init import Init, constant, normal, zeros


class Pairing(Enum):
    """Which encoder state decoder group i of n receives."""

    mirror = "mirror"
    deepest = "deepest"


class Start(Enum):
    """The law of a matrix's initial values."""

    uniform = "uniform"
    normal = "normal"


class GateOf(Enum):
    """What the gate of `gated` depends on."""

    tokens = "tokens"
    channel = "channel"
    time = "time"


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """What all merges have in common."""

    needs: ClassVar[dict[str, str]] = {"skips": "it takes encoder states into the decoder"}

    pairing: Pairing = option(Pairing.mirror, "mirror: decoder i takes encoder n-1-i (report); deepest: the last one (upstream)")


@dataclass(kw_only=True, slots=True)
class CrossConfig(MergeConfig):
    """Cross-attention from the stream to the encoder state, as a modulated sublayer (XUT)."""

    qk_norm: QKNorm = option(QKNorm.none, "norm of each head's queries and keys: none (XUT), rms, layer or cosine, as in attention")


@dataclass(kw_only=True, slots=True)
class ConcatConfig(MergeConfig):
    """W [x; s] + b before the block, with no residual around it (U-ViT)."""

    start: Start = option(
        Start.uniform, "initial values: uniform in +-1/sqrt(2 dim), as all layers here; normal: std 0.02, bias 0 (U-ViT)"
    )


@dataclass(kw_only=True, slots=True)
class AddConfig(MergeConfig):
    """x + s."""


@dataclass(kw_only=True, slots=True)
class WeightedAddConfig(MergeConfig):
    """x + w s with one learned scalar."""

    init: float = option(0.0, "initial w; 0 starts without the skip")
    both: bool = option(False, "a x + w s, with a learned too, from 1")


@dataclass(kw_only=True, slots=True)
class LerpConfig(MergeConfig):
    """s + f (x - s) with one learned scalar (the token split of HDiT, Crowson et al., 2024)."""

    init: float = option(0.5, "initial f: 0 is the encoder state, 1 the stream")


@dataclass(kw_only=True, slots=True)
class ShareConfig(MergeConfig):
    """What the magnitude-preserving merges have in common."""

    t: float = option(0.5, "share of the encoder state, from 0 to 1")

    def check(self, run: RunConfig) -> None:
        """Refuse a share that is none."""
        from hdm.config.check import require

        require(0 <= self.t <= 1, f"merge.t={self.t}: must be between 0, the stream alone, and 1, the encoder state alone")


@dataclass(kw_only=True, slots=True)
class MpSumConfig(ShareConfig):
    """((1 - t) x + t s) / sqrt((1 - t)^2 + t^2), which keeps the magnitude of independent streams (EDM2, eq. 88)."""


@dataclass(kw_only=True, slots=True)
class MpCatConfig(ShareConfig):
    """W [(1 - t) x; t s] sqrt(2 / ((1 - t)^2 + t^2)), the rows of W normed, which keeps magnitudes too (EDM2, eq. 103)."""


@dataclass(kw_only=True, slots=True)
class GatedConfig(MergeConfig):
    """x + gate * s, the identity at the start; by default x + sigmoid(G [x; s] + b) * (W s), W starting at zero."""

    gate: GateOf = option(
        GateOf.tokens,
        "tokens: sigmoid(G [x; s] + b) * (W s); channel: g * s, g learned, from 0;"
        " time: (W silu(time) + b) * s, from 0, as adaLN-Zero makes its gates",
    )


@dataclass(kw_only=True, slots=True)
class NoneConfig(MergeConfig):
    """x: encoder states are not used."""

    needs: ClassVar[dict[str, str]] = {}


class Merge(nn.Module):
    """Merges the stream and an encoder state of the same tokens; `output` names the linear layer that ends a modulated merge."""

    modulated = False
    output: str

    def __init__(self, config: MergeConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B S D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """The new stream; of a modulated merge, what its sublayer adds to it."""
        raise NotImplementedError


@MERGE.register("cross", CrossConfig)
class Cross(Merge):
    """Attention(q = x, kv = s); s is not normed."""

    modulated = True
    output = "attn.out"

    def __init__(self, config: CrossConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.attn = CrossAttention(size, rope=encoding.per_layer(), qk_norm=config.qk_norm)

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B S D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return self.attn(x, s, layout)


@MERGE.register("concat", ConcatConfig)
class Concat(Merge):
    """See ConcatConfig."""

    def __init__(self, config: ConcatConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.start = config.start
        self.proj = nn.Linear(2 * size.dim, size.dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`. U-ViT cuts its normal law at +-2, a hundred standard deviations away."""
        return {} if self.start is Start.uniform else {"proj.weight": normal(0.02), "proj.bias": zeros}

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return self.proj(torch.cat([x, s], dim=-1))


@MERGE.register("add", AddConfig)
class Add(Merge):
    """See AddConfig."""

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return x + s


@MERGE.register("weighted_add", WeightedAddConfig)
class WeightedAdd(Merge):
    """See WeightedAddConfig."""

    def __init__(self, config: WeightedAddConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.start, self.dim = config.init, size.dim
        self.scale = nn.Parameter(torch.empty(1))
        self.stream = nn.Parameter(torch.empty(1)) if config.both else None

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"scale": constant(self.start)} | ({} if self.stream is None else {"stream": constant(1.0)})

    def fan_in(self) -> dict[str, int]:
        """See `hdm.train.optimizer`. A scalar stands for a gain of D equal channels; by its shape it would move by lr a step."""
        return dict.fromkeys(self.initial(), self.dim)

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        kept = x if self.stream is None else self.stream.to(x.dtype) * x
        return kept + self.scale.to(s.dtype) * s


@MERGE.register("lerp", LerpConfig)
class Lerp(Merge):
    """See LerpConfig; HDiT's projection of the stream to twice the side has no place in a U of one resolution.

    The first decoder group starts from the very state that it merges: there f has no effect.
    """

    def __init__(self, config: LerpConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.start, self.dim = config.init, size.dim
        self.factor = nn.Parameter(torch.empty(1))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"factor": constant(self.start)}

    def fan_in(self) -> dict[str, int]:
        """See WeightedAdd."""
        return {"factor": self.dim}

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return s + self.factor.to(x.dtype) * (x - s)


@MERGE.register("mp_sum", MpSumConfig)
class MpSum(Merge):
    """See MpSumConfig."""

    def __init__(self, config: MpSumConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.t = config.t

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return ((1 - self.t) * x + self.t * s) / math.hypot(1 - self.t, self.t)


@MERGE.register("mp_cat", MpCatConfig)
class MpCat(Merge):
    """See MpCatConfig. Rows are normed in the forward pass, as EDM2's convolutions do it; there is no bias."""

    def __init__(self, config: MpCatConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.t = config.t
        self.proj = nn.Linear(2 * size.dim, size.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        balance = math.sqrt(2) / math.hypot(1 - self.t, self.t)
        both = torch.cat([balance * (1 - self.t) * x, balance * self.t * s], dim=-1)
        return F.linear(both, F.normalize(self.proj.weight, dim=1))


@MERGE.register("gated", GatedConfig)
class Gated(Merge):
    """See GatedConfig."""

    def __init__(self, config: GatedConfig, size: ModelConfig, encoding: Encoding) -> None:
        super().__init__(config, size, encoding)
        self.of = config.gate
        match config.gate:
            case GateOf.tokens:
                self.gate = nn.Linear(2 * size.dim, size.dim)
                self.proj = nn.Linear(size.dim, size.dim, bias=False)
            case GateOf.channel:
                self.scale = nn.Parameter(torch.empty(size.dim))
            case GateOf.time:
                self.timed = nn.Linear(size.dim, size.dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        names = {GateOf.tokens: ["proj.weight"], GateOf.channel: ["scale"], GateOf.time: ["timed.weight", "timed.bias"]}[self.of]
        return dict.fromkeys(names, zeros)

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        match self.of:
            case GateOf.tokens:
                return x + self.gate(torch.cat([x, s], dim=-1)).sigmoid() * self.proj(s)
            case GateOf.channel:
                return x + self.scale.to(s.dtype) * s
            case GateOf.time:
                assert layout.time is not None
                return x + self.timed(F.silu(layout.time)).to(s.dtype) * s


@MERGE.register("none", NoneConfig)
class NoMerge(Merge):
    """See NoneConfig."""

    def forward(self, x: Float[Tensor, "B T D"], s: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Merge."""
        return x
