"""The Fréchet distance between two Gaussians, from features or from their mean and covariance, in double precision.

FD^2 = |m - n|^2 + tr S + tr T - 2 tr (S T)^(1/2) (Dowson and Landau, 1982; FID of Heusel et al., 2017, is this number, without a
root). With roots S = A'A and T = B'B, the last trace is the sum of the singular values of A B'. Two ways to it:

* n >= d samples: A is a Cholesky factor, and the singular values are roots of the eigenvalues of the symmetric B S B';
* n < d: A is the n centred samples, so the matrix to decompose has n rows instead of d.

The matrix square root, and the eigenvalues of the product S T which is not symmetric, cost more (benchmarks/evaluation.py) and lose
digits where a covariance is singular. Torch's LAPACK takes half the time of numpy's for the eigenvalues, hence the tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(slots=True)
class Moments:
    """Count, mean (D,) and scatter (D, D), the sum of (x - mean)(x - mean)', of samples that come in parts."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, parts: Iterable[Array]) -> "Moments":
        """The moments of all rows of `parts`, each (n, D). Raises ValueError without rows."""
        total: Moments | None = None
        for part in parts:
            if len(part):
                x = np.asarray(part, dtype=np.float64)
                mean = x.mean(axis=0)
                own = cls(len(x), mean, (x - mean).T @ (x - mean))
                total = own if total is None else total.merged(own)
        if total is None:
            raise ValueError("no samples")
        return total

    def merged(self, other: "Moments") -> "Moments":
        """Both together, without cancellation (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Array:
        """Unbiased, (D, D)."""
        return self.scatter / (self.count - 1)


@dataclass(slots=True)
class Gaussian:
    """A mean (D,) and a root R (r, D) of the covariance R'R."""

    mean: Array
    root: Array
    square: bool = False  # R is (D, D)

    @classmethod
    def of_features(cls, features: Array) -> "Gaussian":
        """Of samples (n, D)."""
        n, d = features.shape
        if n > d:
            return cls.of_moments(Moments.of(np.array_split(features, max(1, n // 4096))))
        mean = features.mean(axis=0)
        return cls(mean, (features - mean) / np.sqrt(n - 1))

    @classmethod
    def of_moments(cls, moments: Moments) -> "Gaussian":
        """Of a mean and covariance, singular or not."""
        return cls(moments.mean, root(moments.covariance), square=True)


def root(covariance: Array) -> Array:
    """R (d, d) with R'R = covariance: the Cholesky factor, or, of a singular one, through its eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(covariance))
    if not failed:
        return np.asarray(factor.T.numpy())
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance."""
    cross = torch.from_numpy(a.root) @ torch.from_numpy(b.root).T
    if a.square and b.square:
        values = torch.linalg.eigvalsh(cross @ cross.T).clamp_(min=0.0).sqrt_()
    else:
        values = torch.linalg.svdvals(cross)
    trace = float(values.sum())
    return float(((a.mean - b.mean) ** 2).sum() + (a.root**2).sum() + (b.root**2).sum() - 2.0 * trace)
