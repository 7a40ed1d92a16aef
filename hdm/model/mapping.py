"""Networks between the time embedding and the modulations, which some variants of the adaLN axis hold (spec 3)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.model.init import Init, zeros
from hdm.model.norm import RmsConfig, RMSNorm


class MappingNetwork(nn.Module):
    """RMSNorm, residual layers y + W_down(a * gelu(b)) with (a, b) = W_up RMSNorm(y), W_down from zero, RMSNorm (HDiT)."""

    def __init__(self, dim: int, hidden: int, *, layers: int) -> None:
        super().__init__()
        self.enter, self.leave = RMSNorm(RmsConfig(), dim), RMSNorm(RmsConfig(), dim)
        self.norm = nn.ModuleList(RMSNorm(RmsConfig(), dim) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(dim, 2 * hidden, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(hidden, dim, bias=False) for _ in range(layers))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {f"down.{i}.weight": zeros for i in range(len(self.down))}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 D"]:
        """Map the time embedding."""
        y = self.enter(time)
        for norm, up, down in zip(self.norm, self.up, self.down):
            value, gate = up(norm(y)).chunk(2, dim=-1)
            y = y + down(value * F.gelu(gate))
        return self.leave(y)


class Approximator(nn.Module):
    """Linear(I, M), residual layers y + Linear(silu(Linear(RMSNorm(y)))) of width M, Linear(M, O) from zero (Chroma, spec 3)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(RMSNorm(RmsConfig(), hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(layers)
        )
        self.leave = nn.Linear(hidden, outputs)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"leave.weight": zeros, "leave.bias": zeros}

    def vectors(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """One pass."""
        y = self.enter(x)
        for layer in self.layers:
            y = y + layer(y)
        return self.leave(y)
