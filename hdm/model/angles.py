"""Angles of positions, and their sines and cosines, which the encodings are made of (spec 5)."""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def turn(
    position: Float[Tensor, "B T 2"], log_frequencies: Float[Tensor, "H K 2"], *, blocks: bool = False
) -> Complex[Tensor, "B H T P"]:
    """exp(i frequency coordinate), for P = 2K pairs: y and x alternate, or in `blocks` all of y come first."""
    angle = position[:, None, :, None, :] * log_frequencies.exp()[:, None]  # B H T K 2
    angle = (angle.transpose(-1, -2) if blocks else angle).flatten(-2)
    return torch.complex(angle.cos(), angle.sin())


def lang(count: int, theta: float, device: torch.device | str = "cpu") -> Float[Tensor, " K"]:
    """Logarithms of theta^(-k/K), k = 0 … K - 1: the frequencies of language models."""
    return -math.log(theta) / count * torch.arange(count, dtype=torch.float64, device=device)


def token_numbers(position: Float[Tensor, "B N 2"], middle: float, side: float, base: int) -> Float[Tensor, "B N 2"]:
    """Positions in tokens: 0, 1 … base - 1 are the centres of the tokens of a square image."""
    return ((position - middle) / side + 0.5) * base - 0.5


def sincos_table(numbers: Float[Tensor, "B N 2"], dim: int) -> Float[Tensor, "B N D"]:
    """Half of the channels for x, then half for y; within a half sin(w_k g), cos(w_k g), w_k = 10000^(-k / (D/4))."""
    k = torch.arange(dim // 4, dtype=numbers.dtype, device=numbers.device)
    angle = numbers.flip(-1)[..., None] * torch.exp(-math.log(1e4) * k / (dim // 4))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
