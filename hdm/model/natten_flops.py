"""What natten's kernels compute, for torch's FLOP counter: natten registers no formula, so its attention counts as nothing.

Counted as torch counts attention: two matrix products forward and five backward, which computes the scores again. natten's own
windows are whole at every token (`hdm.model.local_attention`), so that N tokens meet k x k keys each.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]

# Kernels for two axes, and where among the arguments behind `scale` the grid is; None: the tensors have its axes.
_NEIGHBORHOOD = {"na2d": None, "reference_na2d": 0, "hopper_na2d": 2, "blackwell_na2d": 2}
_FULL = ("fmha", "hopper_fmha", "blackwell_fmha")  # what natten calls where the window is the grid


def register() -> None:
    """Tell torch.utils.flop_counter of the natten kernels that this installation has; again is of no consequence.

    An installation without CUDA has none of them: natten then computes by torch's flex_attention, which torch counts densely.
    """
    named = {f"{name}_forward": partial(forward, grid_at=at) for name, at in _NEIGHBORHOOD.items()}
    named |= {f"{name}_backward": partial(backward, grid_at=at) for name, at in _NEIGHBORHOOD.items()}
    named |= {f"{name}_forward": partial(full, products=(1, 1)) for name in _FULL}
    named |= {f"{name}_backward": partial(full, products=(3, 2)) for name in _FULL}
    for name, formula in named.items():
        kernel = getattr(torch.ops.natten, name, None)
        if kernel is not None and kernel not in flop_registry:
            register_flop_formula(kernel)(formula)


def forward(q: Shape, k: Shape, v: Shape, window: Shape, *rest: Any, grid_at: int | None = None, **_: Any) -> int:
    """FLOPs of (B, rows, columns, H, C) queries that read a window each; of permuted tokens (B, T, H, C) the grid is told."""
    return _products(q, v, window, rest[4:], grid_at=grid_at, products=(1, 1))


def backward(q: Shape, k: Shape, v: Shape, *rest: Any, grid_at: int | None = None, **_: Any) -> int:
    """FLOPs of the gradients of queries, keys and values, the scores again included."""
    window = rest[3]  # behind the output, its gradient and the sums
    return _products(q, v, window, rest[8:], grid_at=grid_at, products=(3, 2))


def full(q: Shape, k: Shape, v: Shape, *rest: Any, products: tuple[int, int], **_: Any) -> int:
    """FLOPs of (B, T, H, C) queries that read all keys."""
    return 2 * math.prod(q[:-1]) * k[1] * (products[0] * q[-1] + products[1] * v[-1])


def _products(q: Shape, v: Shape, window: Shape, rest: Sequence[Any], *, grid_at: int | None, products: tuple[int, int]) -> int:
    """2 for each multiply-add of `products` matrix products over the channels of keys and over those of values."""
    grid = q[1:3] if grid_at is None else rest[grid_at]
    pairs = q[0] * q[-2] * math.prod(grid) * math.prod(window)
    return 2 * pairs * (products[0] * q[-1] + products[1] * v[-1])
