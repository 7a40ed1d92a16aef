"""The way in and out: patches, time and aspect ratio (spec 1.2)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


class PatchOutput(nn.Module):
    """Tokens back to a latent image: one linear layer, with no norm before it and a tiny initial weight, std 1/dim^2."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(dim, channels * patch * patch)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"proj.weight": normal(self.proj.in_features**-2)}

    def forward(self, x: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """The latent image of a token `grid` of (rows, columns)."""
        return self.lay(self.proj(x), grid)

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
        return nn.functional.mish(self.proj(features.to(self.proj.weight.dtype)))[:, None]


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
        return self.out(nn.functional.mish(self.up(aspect.to(self.up.weight.dtype)[:, None])))[:, None]
