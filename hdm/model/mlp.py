"""The mlp axis: the position-wise network of a block."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import MLP
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, RunConfig


@dataclass(kw_only=True, slots=True)
class SwigluConfig:
    """w3(silu(a) * b) with (a, b) = w12(x), hidden width model.mlp_dim (Shazeer, 2020; XUT)."""


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


class Mlp(nn.Module):
    """Applies one network to every token; `output` names the linear layer that ends it."""

    output: str

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the sublayer adds to the stream."""
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

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """See Mlp."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


@MLP.register("gelu", GeluConfig)
class Gelu(Mlp):
    """With biases."""

    output = "down"

    def __init__(self, config: GeluConfig, size: ModelConfig) -> None:
        super().__init__()
        hidden = int(size.mlp_dim * config.width)
        self.up = nn.Linear(size.dim, hidden)
        self.down = nn.Linear(hidden, size.dim)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """See Mlp."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))
