"""The way in and out: patches, time and aspect ratio (spec 1.2 and 3)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.schema import Final
from hdm.model.init import Init, normal, zeros


class PatchEmbed(nn.Module):
    """A latent image as tokens, row by row: one strided convolution."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """N = (H / patch) * (W / patch) tokens. Raises ValueError for sides that the patch does not divide."""
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"latents of {height} x {width}: both sides must be multiples of the patch side {self.patch}")
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class FinalModulation(nn.Module):
    """x (1 + scale) + shift of the normed tokens in front of the output layer; a variant makes both of the time embedding."""

    def forward(self, x: Float[Tensor, "B N D"], time: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B N D"]:
        """The modulated tokens."""
        scale, shift = self.vectors(time).chunk(2, dim=-1)
        return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)

    def vectors(self, time: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 M"]:
        """Scale and shift, side by side."""
        raise NotImplementedError


class FinalAdaLN(FinalModulation):
    """Linear(D, 2D)(silu(time)), from zero (DiT: the 2,099,200 parameters of spec 3 at D = 1024)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, 2 * dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"layer.weight": zeros, "layer.bias": zeros}

    def vectors(self, time: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 M"]:
        """See FinalModulation."""
        return self.layer(F.silu(time))


class FinalTable(FinalModulation):
    """A learned offset of 2D, std 1/sqrt(D), plus the time embedding itself, once for each (PixArt's adaLN-single)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.table = nn.Parameter(torch.empty(2 * dim))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"table": normal(self.dim**-0.5)}

    def vectors(self, time: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 M"]:
        """See FinalModulation."""
        return torch.cat([time, time], dim=-1) + self.table.to(time.dtype)


def final_modulation(kind: Final, dim: int) -> FinalModulation | None:
    """The module that `kind` names; None for none."""
    match kind:
        case Final.none:
            return None
        case Final.adaln:
            return FinalAdaLN(dim)
        case Final.table:
            return FinalTable(dim)


class PatchOutput(nn.Module):
    """Tokens back to a latent image: one linear layer, with a tiny initial weight, std 1/dim^2, or from `zero`.

    XUT has nothing in front of it. DiT and PixArt have a `norm` and a `final` modulation, U-ViT and HDiT the norm alone.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        patch: int,
        *,
        norm: nn.Module | None = None,
        final: FinalModulation | None = None,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.zero = patch, zero
        self.norm, self.final = norm, final
        self.proj = nn.Linear(dim, channels * patch * patch)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        if self.zero:
            return {"proj.weight": zeros, "proj.bias": zeros}
        return {"proj.weight": normal(self.proj.in_features**-2)}

    def forward(
        self, x: Float[Tensor, "B N D"], grid: tuple[int, int], time: Float[Tensor, "B 1 D"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The latent image of a token `grid` of (rows, columns); `time` is the time embedding, for the final modulation."""
        return self.lay(self.project(x, time), grid)

    def project(self, x: Float[Tensor, "B N D"], time: Float[Tensor, "B 1 D"] | None = None) -> Float[Tensor, "B N P"]:
        """The outputs of each token."""
        if self.norm is not None:
            x = self.norm(x)
        if self.final is not None:
            x = self.final(x, time)
        return self.proj(x)

    def lay(self, outputs: Float[Tensor, "B N P"], grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Lay the projected tokens out; the outputs of a token run over the patch's rows, columns, channels."""
        patches = outputs.view(len(outputs), *grid, self.patch, self.patch, -1)  # B rows columns p p C
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimeEmbed(nn.Module):
    """mish(Linear(sinusoid(1000 t)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, timestep: Float[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """Embed timesteps in [0, 1]. The sinusoid is computed in the dtype of `timestep`: in bf16 1000 t would lose its digits."""
        half = self.proj.in_features // 2
        k = torch.arange(half, dtype=timestep.dtype, device=timestep.device)
        angle = 1000 * timestep[:, None] * torch.exp(-math.log(1e4) * k / half)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return F.mish(self.proj(features.to(self.proj.weight.dtype)))[:, None]


class AspectEmbed(nn.Module):
    """Linear(mish(Linear(log aspect ratio))); the last layer starts at zero, so that the network first learns without it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(1, dim)
        self.out = nn.Linear(dim, dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"out.weight": zeros, "out.bias": zeros}

    def forward(self, aspect: Float[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """Embed log(width / height)."""
        return self.out(F.mish(self.up(aspect.to(self.up.weight.dtype)[:, None])))[:, None]
