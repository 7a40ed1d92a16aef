"""The norm axis: what a sublayer's input goes through before adaLN scales and shifts it (spec 1.1).

The QK-norms of attention are the same modules over the channels of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import NORM
from hdm.config.registry import option
from hdm.model.init import Init, constant, zeros


@dataclass(kw_only=True, slots=True)
class RmsConfig:
    """x / rms(x) * gain (Zhang & Sennrich, 2019)."""

    affine: bool = option(True, "a learned gain; false where adaLN's scale is all there is (HDiT, LightningDiT)")


@dataclass(kw_only=True, slots=True)
class LayerConfig:
    """(x - mean(x)) / std(x) * gain + bias (Ba et al., 2016)."""

    affine: bool = option(True, "learned gain and bias; false where adaLN's scale and shift are all there are (DiT, PixArt)")


@dataclass(kw_only=True, slots=True)
class DynamicTanhConfig:
    """tanh(a x) * gain + bias with one learned scalar a, and no statistics of x (DyT, Zhu et al., 2025)."""

    init: float = option(0.5, "initial a")


class Norm(nn.Module):
    """Maps a vector of `dim` channels to one of bounded size; the learned gain, where there is one, starts at 1."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, dim: int, *, gain: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(dim)) if gain else None
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        laws = {"weight": constant(1.0), "bias": zeros}
        return {name: law for name, law in laws.items() if getattr(self, name) is not None}

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the normed `x`, in its own dtype."""
        raise NotImplementedError


@NORM.register("rms", RmsConfig)
class RMSNorm(Norm):
    """Over the last dimension, with eps 1e-6 (spec 1.2)."""

    def __init__(self, config: RmsConfig, dim: int) -> None:
        super().__init__(dim, gain=config.affine)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """See Norm."""
        return F.rms_norm(x, (self.dim,), _as(self.weight, x), eps=1e-6)


@NORM.register("layer", LayerConfig)
class LayerNorm(Norm):
    """Over the last dimension, with eps 1e-6."""

    def __init__(self, config: LayerConfig, dim: int) -> None:
        super().__init__(dim, gain=config.affine, bias=config.affine)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """See Norm."""
        return F.layer_norm(x, (self.dim,), _as(self.weight, x), _as(self.bias, x), eps=1e-6).to(x.dtype)


@NORM.register("dynamic_tanh", DynamicTanhConfig)
class DynamicTanh(Norm):
    """See DynamicTanhConfig."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, config: DynamicTanhConfig, dim: int) -> None:
        super().__init__(dim, bias=True)
        self.start = config.init
        self.alpha = nn.Parameter(torch.empty(1))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return Norm.initial(self) | {"alpha": constant(self.start)}

    def fan_in(self) -> dict[str, int]:
        """See `hdm.train.optimizer`. The scalar stands for a gain of D equal channels."""
        return {"alpha": self.dim}

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """See Norm."""
        return torch.tanh(self.alpha.to(x.dtype) * x) * self.weight.to(x.dtype) + self.bias.to(x.dtype)


def _as(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """The parameter in the dtype of `x`: an fp32 gain beside a bf16 stream would lose the fused kernel and return fp32."""
    return None if parameter is None else parameter.to(x.dtype)
