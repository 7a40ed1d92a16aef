"""The orthogonal factor of matrices, by products alone: the Newton-Schulz iteration of Muon."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# X <- a X + b (X X^T) X + c (X X^T)^2 X: singular values above 0.001 end between 0.7 and 1.2 after five steps (Jordan et al., 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: Sequence[Float[Tensor, "A B"]], *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> list[Float[Tensor, "A B"]]:
    """U V^T of each U S V^T, roughly: S is brought near 1, not to 1. Matrices of one shape are multiplied together."""
    result = list(matrices)
    places: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(i)
    for at in places.values():
        for i, matrix in zip(at, _newton_schulz(torch.stack([matrices[i] for i in at]).to(dtype), steps), strict=True):
            result[i] = matrix
    return result


def _newton_schulz(x: Float[Tensor, "N A B"], steps: int) -> Float[Tensor, "N A B"]:
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the largest singular value is 1 at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
