"""Squared maximum mean discrepancies, exact, in blocks: a check on KID, CMMD, and the sampling error of both.

The unbiased estimate of two sets leaves out the pairs of a sample with itself and can be negative (Gretton et al., 2012, eq. 3);
the biased one keeps them (eq. 5).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from eval.threads import in_parallel

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]

_BLOCK = 512
ERROR_SAMPLES = 4000  # the error of a larger set is that of so many of its samples, scaled by their number


def polynomial(x: Array, y: Array) -> Array:
    """(x.y / d + 1)^3, the kernel of KID (Binkowski et al., 2018), (n, m)."""
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(x: Array, y: Array) -> Array:
        squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2.0 * (x @ y.T)
        return np.asarray(np.exp(-np.maximum(squared, 0.0) / (2.0 * sigma**2)))

    return kernel


def mmd(x: Array, y: Array, kernel: Kernel, *, biased: bool = False) -> float:
    """The squared MMD of samples x (n, D) and y (m, D)."""
    n, m = len(x), len(y)
    cross = sum(float(block.sum()) for _, block in _blocks(x, y, kernel)) / (n * m)
    return _within(x, kernel, biased) + _within(y, kernel, biased) - 2.0 * cross


def mmd_error(x: Array, y: Array, kernel: Kernel, weights: Array) -> float:
    """The standard error of `mmd` when x (n, D) is drawn again: its spread over bootstrap `weights` (B, n), y held fixed.

    Pairs of a sample with itself stay out, also where it was drawn twice: counted, they would add a bias.
    """
    n = len(x)
    if n > ERROR_SAMPLES:
        rows = np.linspace(0, n - 1, ERROR_SAMPLES).astype(int)
        scale = np.sqrt(ERROR_SAMPLES / n)
        return float(scale * mmd_error(x[rows], y, kernel, weights[:, :ERROR_SAMPLES]))
    inner = kernel(x, x)
    np.fill_diagonal(inner, 0.0)
    cross = np.concatenate([block.mean(axis=1) for _, block in _blocks(x, y, kernel)])
    total = weights.sum(axis=1)
    within = ((weights @ inner) * weights).sum(axis=1) / (total**2 - (weights**2).sum(axis=1))
    return float(np.std(within - 2.0 * (weights @ cross) / total, ddof=1))


def _within(x: Array, kernel: Kernel, biased: bool) -> float:
    n, total = len(x), 0.0
    for start, block in _blocks(x, x, kernel):
        own = 0.0 if biased else float(np.diagonal(block[:, start:]).sum())
        total += float(block.sum()) - own
    return total / (n * n if biased else n * (n - 1))


def _blocks(x: Array, y: Array, kernel: Kernel) -> Iterator[tuple[int, Array]]:
    """The kernel of some rows of x with all of y, and which rows."""
    return in_parallel(lambda start: (start, kernel(x[start : start + _BLOCK], y)), range(0, len(x), _BLOCK))
