"""Precision, recall, density and coverage: whether images lie among the real ones, and reach all of them.

A set's manifold is the union of balls around its samples that reach to their k-th nearest neighbour. Precision and recall
(Kynkaanniemi et al., 2019) come from torch-fidelity, density and coverage (Naeem et al., 2020) are here.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.threads import in_parallel

Array = NDArray[np.float64]

NEIGHBOURS = 5  # k; Naeem et al. use 5, Kynkaanniemi et al. 3
_BLOCK = 1024


def prdc(generated: Array, real: Array, *, k: int = NEIGHBOURS) -> dict[str, float]:
    """The four numbers by name. Both sets need more than k samples."""
    from hdm import torchvision_cpu

    torchvision_cpu.declare()
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    fake, true = torch.from_numpy(generated), torch.from_numpy(real)
    precision, recall = calculate_precision_recall_part(fake, true, k, _BLOCK)
    inside = _inside(fake, true, radii(true, k))
    return {
        "precision": float(precision),
        "recall": float(recall),
        "density": float(inside.sum().double() / (k * len(fake))),
        "coverage": float(inside.any(dim=0).double().mean()),
    }


def prdc_errors(generated: Array, real: Array, weights: Array, *, k: int = NEIGHBOURS) -> dict[str, float]:
    """Standard errors when the generated samples are drawn again: the spread over bootstrap `weights` (B, n), radii held fixed."""
    fake, true = torch.from_numpy(generated), torch.from_numpy(real)
    inside = _inside(fake, true, radii(true, k)).double()
    reached = _inside(true, fake, radii(fake, k)).double()  # (real, generated)
    drawn = torch.from_numpy(weights).double()
    present = (drawn > 0).double()
    series = {
        "precision": drawn @ inside.any(dim=1).double() / drawn.sum(dim=1),
        "recall": ((present @ reached.T) > 0).double().mean(dim=1),
        "density": drawn @ inside.sum(dim=1) / (k * drawn.sum(dim=1)),
        "coverage": ((present @ inside) > 0).double().mean(dim=1),
    }
    return {name: float(values.std()) for name, values in series.items()}


def radii(points: Tensor, k: int) -> Tensor:
    """The distance of each point (n, D) to its k-th nearest other, (n,)."""
    blocks = torch.split(points, _BLOCK)
    return torch.cat(list(in_parallel(lambda part: torch.cdist(part, points).kthvalue(k + 1).values, blocks)))


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each point (n, D) to the nearest of `others` (m, D), and which one it is: (n,), (n,)."""
    found = list(in_parallel(lambda part: torch.cdist(part, others).min(dim=1), torch.split(points, _BLOCK)))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _inside(points: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """Whether each point lies in the ball of each centre: bool (points, centres)."""
    return torch.cat(list(in_parallel(lambda part: torch.cdist(part, centres) <= reach, torch.split(points, _BLOCK))))
