"""Arithmetic of a forward pass, counted on the meta device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hdm.model.backbone import Architecture, Condition, Route


def count_flops(architecture: Architecture, *, grid: tuple[int, int], text_tokens: int, rate: float = 0.0) -> int:
    """FLOPs of one forward pass per sample, 2 for each multiply-add of matrix products, convolutions and attention.

    `grid` is (rows, columns) of image tokens, `rate` the fraction of them that bypass. Runs nothing and takes no memory. Local
    attention counts the keys of its windows, whatever a device computes: see `Neighborhood.cut`, and docs/xut.md for closed forms.
    """
    from hdm.model import build

    model = build(architecture, device="meta", seed=None)
    patch = architecture.size.patch
    with torch.device("meta"):
        x = torch.empty(1, architecture.in_channels, grid[0] * patch, grid[1] * patch)
        condition = Condition(
            text=torch.empty(1, text_tokens, architecture.context_dim),
            position=torch.empty(1, grid[0] * grid[1], 2),
            aspect=torch.empty(1),
        )
        route = Route(noise=torch.empty(1, grid[0] * grid[1]), rate=rate)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(x, torch.empty(1), condition, route=route)
    return counter.get_total_flops()
