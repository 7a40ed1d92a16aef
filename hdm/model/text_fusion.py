"""The text fusion axis: how text states meet image tokens (spec 6)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hdm.config.axes import TEXT_FUSION
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, RunConfig
from hdm.model.attention import Layout, attend, rotate
from hdm.model.backbone import Condition
from hdm.model.encoding import Encoding
from hdm.model.init import Init, constant, normal, zeros
from hdm.model.norm import RmsConfig, RMSNorm


@dataclass(kw_only=True, slots=True)
class FusionConfig:
    """What all fusions have in common."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "text tokens follow the image tokens through every block"}

    mask: bool = option(True, "no token attends to padding; false attends to it, as the upstream code does (spec 1.3 o)")


@dataclass(kw_only=True, slots=True)
class ConcatConfig(FusionConfig):
    """Text tokens follow the image tokens through every block and share all weights with them (report, "Minimal Architecture")."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "text tokens follow the image tokens"}

    norm: bool = option(False, "an RMS norm behind the projection, its gain from norm_gain (SANA); false in XUT")
    norm_gain: float = option(0.01, "initial gain of that norm")


@dataclass(kw_only=True, slots=True)
class CrossAttnConfig(FusionConfig):
    """Cross-attention from the stream to the text between self-attention and MLP, without norm and gate (PixArt, SANA).

    Text states pass an MLP of two layers first; the attention's output layer starts at zero. PixArt's null caption is a random
    vector that training overwrites by the encoded empty prompt; here it is the encoded empty caption from the start.
    """

    takes: ClassVar[dict[str, str]] = {"text_sequence": "text is read by cross-attention and is no part of the sequence"}

    norm: bool = option(False, "an RMS norm of the text states behind their MLP, as SANA has it")
    norm_gain: float = option(0.01, "initial gain of that norm")


@dataclass(kw_only=True, slots=True)
class CrossAttnGatedConfig(FusionConfig):
    """Cross-attention to the text states themselves as a modulated sublayer: XUT's author's code with concat_ctx=False."""

    takes: ClassVar[dict[str, str]] = {"text_sequence": "text is read by cross-attention and is no part of the sequence"}


@dataclass(kw_only=True, slots=True)
class MmditConfig(FusionConfig):
    """Text tokens with weights of their own in every block, and one attention over both (SD3, Esser et al., 2024)."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "text tokens follow the image tokens"}
    needs: ClassVar[dict[str, str]] = {"joint": "both streams meet in one attention with two sets of projections"}


@dataclass(kw_only=True, slots=True)
class DoubleConfig(FusionConfig):
    """The first blocks as mmdit, the others with shared weights as concat (Flux; minRF: 4 of 8 blocks)."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "text tokens follow the image tokens"}
    needs: ClassVar[dict[str, str]] = {"joint": "both streams meet in one attention with two sets of projections"}

    share: float = option(1 / 3, "share of the blocks, from the first, whose text has its own weights: 19 of 57 in Flux")
    registers: int = option(0, "learned tokens behind the text, which everything attends to; 8 in minRF")

    def check(self, run: RunConfig) -> None:
        """Refuse a share that is none, and fewer than no tokens."""
        from hdm.config.check import require

        require(self.registers >= 0, f"text_fusion.registers={self.registers}: must be 0 or above; 8 in minRF")
        require(0 <= self.share <= 1, f"text_fusion.share={self.share}: must be between 0, as concat, and 1, as mmdit")


class TextSublayer(nn.Module):
    """Cross-attention from the stream to the text states, which are of `context` channels; with `encoding`, queries are rotated."""

    modulated: bool
    output = "out"

    def __init__(self, size: ModelConfig, context: int, *, encoding: Encoding | None, bias: bool) -> None:
        super().__init__()
        self.heads, self.modulated = size.heads, encoding is not None
        self.rope = None if encoding is None else encoding.per_layer()
        self.q = nn.Linear(size.dim, size.dim, bias=bias)
        self.kv = nn.Linear(context, 2 * size.dim, bias=bias)
        self.out = nn.Linear(size.dim, size.dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`. Without modulation biases start at zero (PixArt, SANA).

        Others, of 1 / sqrt(D), would drown text whose norm starts at 0.01, and the more so the narrower the network.
        """
        return {} if self.modulated else dict.fromkeys(("q.bias", "kv.bias", "out.weight", "out.bias"), zeros)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"kv.weight": 2}

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """What each token reads of the text. Text lies at position (0, 0): of a rotation only the queries' part is seen."""
        assert layout.text is not None
        k, v = self.kv(layout.text).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        if self.modulated:
            q = rotate(q, layout.rotation if self.rope is None else self.rope(layout.position), halves=layout.halves)
        return self.out(attend(q, k, v, layout.text_mask).transpose(1, 2).flatten(2))


class TextFusion(nn.Module):
    """Prepares the text states and says what a block needs of them."""

    joins = True  # the text tokens are a part of the sequence

    def __init__(self, config: FusionConfig, context_dim: int, dim: int) -> None:
        super().__init__()
        self.mask = config.mask

    def forward(self, condition: Condition) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"] | None]:
        """The text as the blocks take it, and which tokens are real; None when all are."""
        mask = condition.text_mask if self.mask else None
        # A mask that hides nothing costs attention its fastest kernels. Asking an accelerator would wait for it.
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        return self.states(condition.text), mask

    def states(self, text: Float[Tensor, "B L C"]) -> Float[Tensor, "B L D"]:
        """The text states in the width that the blocks take."""
        raise NotImplementedError

    def sublayer(self, size: ModelConfig, encoding: Encoding) -> TextSublayer | None:
        """A new cross-attention for one block."""
        return None

    def has_twin(self, index: int, count: int) -> bool:
        """Whether block `index` of `count` has weights of its own for text."""
        return False


@TEXT_FUSION.register("concat", ConcatConfig)
class Concat(TextFusion):
    """One linear layer (spec 1.2)."""

    def __init__(self, config: ConcatConfig | MmditConfig | DoubleConfig, context_dim: int, dim: int) -> None:
        super().__init__(config, context_dim, dim)
        self.proj = nn.Linear(context_dim, dim)
        self.norm = TextNorm(config.norm_gain, dim) if isinstance(config, ConcatConfig) and config.norm else None

    def states(self, text: Float[Tensor, "B L C"]) -> Float[Tensor, "B L D"]:
        """See TextFusion."""
        states = self.proj(text.to(self.proj.weight.dtype))
        return states if self.norm is None else self.norm(states)


@TEXT_FUSION.register("cross_attn", CrossAttnConfig)
class CrossAttn(TextFusion):
    """Linear(gelu(Linear(text))), then attention with biases on queries, keys and values."""

    joins = False

    def __init__(self, config: CrossAttnConfig, context_dim: int, dim: int) -> None:
        super().__init__(config, context_dim, dim)
        self.up, self.down = nn.Linear(context_dim, dim), nn.Linear(dim, dim)
        self.norm = TextNorm(config.norm_gain, dim) if config.norm else None
        self.dim = dim

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`, and TextSublayer."""
        return {"up.bias": zeros, "down.bias": zeros}

    def states(self, text: Float[Tensor, "B L C"]) -> Float[Tensor, "B L D"]:
        """See TextFusion."""
        states = self.down(F.gelu(self.up(text.to(self.up.weight.dtype)), approximate="tanh"))
        return states if self.norm is None else self.norm(states)

    def sublayer(self, size: ModelConfig, encoding: Encoding) -> TextSublayer | None:
        """See TextFusion."""
        return TextSublayer(size, self.dim, encoding=None, bias=True)


@TEXT_FUSION.register("cross_attn_gated", CrossAttnGatedConfig)
class CrossAttnGated(TextFusion):
    """Keys and values straight from the text states, no biases, rotary encoding as everywhere (spec 1.2 and 6)."""

    joins = False

    def __init__(self, config: CrossAttnGatedConfig, context_dim: int, dim: int) -> None:
        super().__init__(config, context_dim, dim)
        self.context_dim = context_dim

    def states(self, text: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """See TextFusion."""
        return text

    def sublayer(self, size: ModelConfig, encoding: Encoding) -> TextSublayer | None:
        """See TextFusion."""
        return TextSublayer(size, self.context_dim, encoding=encoding, bias=False)


@TEXT_FUSION.register("mmdit", MmditConfig)
class Mmdit(Concat):
    """Every block has a twin for text; in the last one text is only read."""

    def has_twin(self, index: int, count: int) -> bool:
        """See TextFusion."""
        return True


@TEXT_FUSION.register("double", DoubleConfig)
class Double(Concat):
    """See DoubleConfig."""

    def __init__(self, config: DoubleConfig, context_dim: int, dim: int) -> None:
        super().__init__(config, context_dim, dim)
        self.share = config.share
        self.registers = nn.Parameter(torch.empty(config.registers, dim)) if config.registers else None

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {} if self.registers is None else {"registers": normal(0.02)}

    def forward(self, condition: Condition) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"] | None]:
        """See TextFusion; the registers are real tokens behind the text."""
        text, mask = super().forward(condition)
        if self.registers is None:
            return text, mask
        registers = self.registers.to(text.dtype).expand(len(text), -1, -1)
        return torch.cat([text, registers], dim=1), None if mask is None else F.pad(mask, (0, registers.shape[1]), value=True)

    def has_twin(self, index: int, count: int) -> bool:
        """See TextFusion."""
        return 0 <= index < round(self.share * count)  # a mixer, of index -1, is no block of the count


class TextNorm(RMSNorm):
    """RMS norm with a small initial gain: text states start quiet (SANA, spec 6)."""

    def __init__(self, gain: float, dim: int) -> None:
        super().__init__(RmsConfig(), dim)
        self.gain = gain

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"weight": constant(self.gain)}
