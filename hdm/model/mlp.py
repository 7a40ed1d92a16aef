"""The mlp axis: the network that a block applies to each token, or, with a convolution in it, to each token and its neighbours."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import MLP
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, RunConfig
from hdm.model.attention import Layout


@dataclass(kw_only=True, slots=True)
class SwigluConfig:
    """w3(silu(a) * b) with (a, b) = w12(x), hidden width model.mlp_dim (Shazeer, 2020; XUT)."""


@dataclass(kw_only=True, slots=True)
class GegluConfig:
    """w3(a * gelu(b)) with (a, b) = w12(x), the exact GELU, hidden width model.mlp_dim (Shazeer, 2020; HDiT)."""

    bias: bool = option(False, "a bias in both layers; HDiT has none, swiglu has both")


@dataclass(kw_only=True, slots=True)
class GeluConfig:
    """down(gelu(up(x))), the tanh form of GELU (Hendrycks & Gimpel, 2016; DiT)."""

    width: float = option(1.5, "hidden width over model.mlp_dim; 1.5 makes as many weights and FLOPs as swiglu, 1 two thirds")

    def check(self, run: RunConfig) -> None:
        """Refuse a width that is none, or no whole number of channels."""
        from hdm.config.check import require

        hidden = run.model.mlp_dim * self.width
        require(
            hidden >= 1 and hidden == int(hidden),
            f"mlp.width={self.width}: makes {hidden:g} of model.mlp_dim={run.model.mlp_dim} channels; choose one that makes a whole"
            " number of them, such as 1.5 or 1",
        )


@dataclass(kw_only=True, slots=True)
class MixFfnConfig:
    """w3(a * silu(b)) with (a, b) = a depthwise 3x3 convolution of silu(w12(x)), Mix-FFN (SANA, Xie et al., 2024)."""

    needs: ClassVar[dict[str, str]] = {"grid": "its convolution takes the neighbours of each image token from the 2-D grid"}
    takes: ClassVar[dict[str, str]] = {"joint": "text tokens are no grid that its convolution could take by itself"}
    adapts: ClassVar[dict[str, str]] = {"image_sequence": "text and time tokens bypass the depthwise convolution"}

    ratio: float | None = option(
        2.5,
        "hidden width over model.dim, 2.5 in SANA; null: model.mlp_dim, the matrices of swiglu",
    )

    def check(self, run: RunConfig) -> None:
        """Refuse a ratio that makes no whole number of channels."""
        from hdm.config.check import require

        hidden = run.model.mlp_dim if self.ratio is None else run.model.dim * self.ratio
        require(
            hidden >= 1 and hidden == int(hidden),
            f"mlp.ratio={self.ratio}: makes {hidden:g} channels of model.dim={run.model.dim}; choose one that makes a whole number"
            " of them, such as 2.5 or 2",
        )


class Mlp(nn.Module):
    """What a block does to its tokens besides attention; `output` names the linear layer that ends it."""

    output: str

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """What the sublayer adds to the stream. `x` may be the first of the tokens of `layout` only, but all image tokens."""
        raise NotImplementedError


@MLP.register("swiglu", SwigluConfig)
class SwiGLU(Mlp):
    """With biases (spec 1.2)."""

    output = "w3"

    def __init__(self, config: SwigluConfig, size: ModelConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(size.dim, 2 * size.mlp_dim)
        self.w3 = nn.Linear(size.mlp_dim, size.dim)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"w12.weight": 2}

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Mlp."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


@MLP.register("geglu", GegluConfig)
class GEGLU(Mlp):
    """See GegluConfig."""

    output = "w3"

    def __init__(self, config: GegluConfig, size: ModelConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(size.dim, 2 * size.mlp_dim, bias=config.bias)
        self.w3 = nn.Linear(size.mlp_dim, size.dim, bias=config.bias)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"w12.weight": 2}

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Mlp."""
        value, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(value * F.gelu(gate))


@MLP.register("gelu", GeluConfig)
class Gelu(Mlp):
    """With biases."""

    output = "down"

    def __init__(self, config: GeluConfig, size: ModelConfig) -> None:
        super().__init__()
        hidden = int(size.mlp_dim * config.width)
        self.up = nn.Linear(size.dim, hidden)
        self.down = nn.Linear(hidden, size.dim)

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Mlp."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


@MLP.register("mix_ffn", MixFfnConfig)
class MixFFN(Mlp):
    """Biases in the first two layers, none in the last (spec 7). What is no image token takes the two linear layers only."""

    output = "w3"

    def __init__(self, config: MixFfnConfig, size: ModelConfig) -> None:
        super().__init__()
        hidden = size.mlp_dim if config.ratio is None else int(size.dim * config.ratio)
        self.w12 = nn.Linear(size.dim, 2 * hidden)
        self.conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.w3 = nn.Linear(hidden, size.dim, bias=False)

    def fan_in(self) -> dict[str, int]:
        """See `hdm.train.optimizer`. The filters do not grow with the width: they are gains, 9 for each channel.

        By their shape alone they would move by lr/9 a step, where the biases beside them move by lr over their number.
        """
        return {"conv.weight": self.conv.weight.numel()}

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"w12.weight": 2}

    def forward(self, x: Float[Tensor, "B T D"], layout: Layout) -> Float[Tensor, "B T D"]:
        """See Mlp. Raises ValueError where the image tokens are no grid."""
        if layout.grid is None:
            raise ValueError(
                "mlp=mix_ffn: its convolution needs the complete grid of image tokens; use routing=none, or mlp=swiglu"
            )
        h = F.silu(self.w12(x))
        n = layout.grid[0] * layout.grid[1]
        image = self.conv(h[:, :n].reshape(len(h), *layout.grid, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        value, gate = torch.cat([image, h[:, n:]], dim=1).chunk(2, dim=-1)
        return self.w3(value * F.silu(gate))
