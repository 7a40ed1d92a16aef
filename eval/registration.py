"""By how much one picture is another one moved: phase correlation (Kuglin and Hines, 1975) on windowed grey images.

The spectrum of a moved picture is that of the picture times a phase that is linear in the frequency; its inverse transform is a
peak at the displacement. The peak is located to 1/20 pixel by evaluating the transform around it (Guizar-Sicairos et al., 2008).
"""

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[np.float64]

_SMOOTH = 0.25  # cycles a pixel: above, pictures of a small network hold noise rather than edges
_FINE = 20


def displacement(before: UInt8[Tensor, "N 3 H W"], after: UInt8[Tensor, "N 3 H W"]) -> Array:
    """(N, 2): down and right, in pixels, by which what is in `before` has moved in `after`. Beyond half a side it is ambiguous."""
    cross = _cross_power(before, after)
    return np.stack([_peak(each) for each in cross])


def common_displacement(before: UInt8[Tensor, "N 3 H W"], after: UInt8[Tensor, "N 3 H W"]) -> Array:
    """(2,): the one displacement that fits all pairs best; the peaks of all pairs are added, so that noise averages out."""
    return _peak(_cross_power(before, after).mean(axis=0))


def zoom(before: UInt8[Tensor, "N 3 H W"], after: UInt8[Tensor, "N 3 H W"], *, widest: float = 2.0) -> Array:
    """(N,): how much closer `after` is than `before`, about the middle, between 1 / widest and widest: the best correlation."""
    factors = np.exp(np.linspace(-np.log(widest), np.log(widest), 81))
    scores = np.stack([_correlation(before, after, float(factor)) for factor in factors])  # (factors, N)
    return np.asarray(factors[scores.argmax(axis=0)])


def _grey(images: Tensor) -> Array:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    return np.asarray((images.double() * weights).sum(dim=1).numpy())


def _windowed(grey: Array) -> Array:
    """Without its mean, fading to nothing at the border, whose jump would otherwise be the strongest edge."""
    rows, columns = grey.shape[1:]
    window = np.outer(np.sin(np.pi * (np.arange(rows) + 0.5) / rows), np.sin(np.pi * (np.arange(columns) + 0.5) / columns))
    mean = (grey * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    return np.asarray((grey - mean) * window)


def _cross_power(before: Tensor, after: Tensor) -> NDArray[np.complex128]:
    a, b = (np.fft.fft2(_windowed(_grey(images))) for images in (before, after))
    cross = b * a.conj()
    magnitude = np.abs(cross)
    floor = 1e-3 * magnitude.max(axis=(1, 2), keepdims=True) + 1e-12
    rows, columns = cross.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)[None, :])
    return np.asarray(cross / (magnitude + floor) * np.exp(-0.5 * (frequency / _SMOOTH) ** 2))


def _peak(cross: NDArray[np.complex128]) -> Array:
    surface = np.fft.ifft2(cross).real
    rows, columns = surface.shape
    y, x = np.unravel_index(surface.argmax(), surface.shape)
    centre = np.array([(y + rows // 2) % rows - rows // 2, (x + columns // 2) % columns - columns // 2], dtype=np.float64)
    steps = np.arange(-_FINE, _FINE + 1) / _FINE
    left = np.exp(2j * np.pi * np.outer(centre[0] + steps, np.fft.fftfreq(rows)))
    right = np.exp(2j * np.pi * np.outer(np.fft.fftfreq(columns), centre[1] + steps))
    fine = (left @ cross @ right).real
    i, j = np.unravel_index(fine.argmax(), fine.shape)
    return np.asarray(centre + np.array([steps[i], steps[j]]))


def _correlation(before: Tensor, after: Tensor, factor: float) -> Array:
    """Of `after` with `before` seen `factor` times closer, over the part that both show."""
    a, b = (torch.from_numpy(_grey(images)) for images in (before, after))
    theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]], dtype=torch.float64).expand(len(a), 2, 3)
    grid = F.affine_grid(theta, [len(a), 1, *a.shape[1:]], align_corners=False)
    seen = F.grid_sample(a[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    shown = ((grid.abs() <= 1).all(dim=-1)).double()
    total = shown.sum(dim=(1, 2)).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        mean = (x * shown).sum(dim=(1, 2)) / total
        return (x - mean[:, None, None]) * shown

    p, q = centred(seen), centred(b)
    norm = (p.square().sum(dim=(1, 2)) * q.square().sum(dim=(1, 2))).sqrt().clamp_min(1e-9)
    return np.asarray(((p * q).sum(dim=(1, 2)) / norm).numpy())
