"""Tables of aspect-ratio buckets: the sizes that `crop=arb` cuts images to, by the laws of three systems (spec 9).

A bucket is (width, height) in pixels; its area is about size^2 and its sides are multiples of `step`. `nearest_shape` and
`nearest_ratio` say which bucket of a table an image goes to; the law of HDM makes a bucket for each image and needs no table.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

Bucket = tuple[int, int]


def nai_table(size: int, step: int, cutoff: float) -> list[Bucket]:
    """The widest first. From the square on the height grows by `step` and the width is floor(size^2 / height), floored to `step`.

    A height that leaves the width as it was is passed over; the first ratio above `cutoff` is the last. The other half mirrors it.
    """
    tall = [(size, size)]
    height = size
    while height <= cutoff * tall[-1][0]:
        height += step
        width = size * size // height // step * step
        if width == 0:
            break
        if width != tall[-1][0]:
            tall.append((width, height))
    return [(height, width) for width, height in reversed(tall[1:])] + tall


def pixart_table(size: int, step: int) -> list[Bucket]:
    """In units of size / 16, every bucket of 0.9 to 1 times the square's area and a ratio from 1/4 to 4; the widest first.

    The law is our reading of the published list of 40 ratios; it leaves one bucket out, 11 x 21 units. Where `step` does not divide
    a unit, sides are rounded to it and equal buckets become one.
    """
    units = [(w, h) for w in range(1, 33) for h in range(1, 33) if 0.9 * 256 <= w * h <= 256 and max(w, h) <= 4 * min(w, h)]
    units.remove((11, 21))
    sides = [[max(round(side * size / 16 / step), 1) * step for side in unit] for unit in units]
    return sorted({(width, height) for width, height in sides}, key=lambda bucket: (bucket[1] / bucket[0], bucket))


def nearest_shape(sizes: Int[np.ndarray, "N 2"], table: list[Bucket]) -> Int[np.ndarray, " N"]:
    """The bucket of each (width, height) whose unit-area rectangle is nearest in Euclidean distance; the first of equals (NAI)."""
    ratios, own = _ratios(sizes), _ratios(np.array(table))
    width, height = np.sqrt(ratios), np.sqrt(1 / ratios)
    return _first_smallest(np.hypot(width - np.sqrt(r), height - np.sqrt(1 / r)) for r in own)


def nearest_ratio(sizes: Int[np.ndarray, "N 2"], table: list[Bucket]) -> Int[np.ndarray, " N"]:
    """The bucket of each (width, height) whose height / width is nearest; the first of equals (PixArt)."""
    ratios, own = _ratios(sizes), _ratios(np.array(table))
    return _first_smallest(np.abs(1 / ratios - 1 / r) for r in own)


def hdm_sizes(sizes: Int[np.ndarray, "N 2"], size: int, step: int) -> Int[np.ndarray, "N 2"]:
    """HDM's own size of each image: size sqrt(r) wide and size / sqrt(r) high, r = width / height, floored to `step`, but not to 0.

    The upstream code stored (width, height) and read them as (height, width); that is not followed.
    """
    root = np.sqrt(_ratios(sizes))
    sides = np.stack([size * root, size / root], axis=1)
    return np.maximum(np.floor(sides / step + 1e-9), 1).astype(np.int64) * step


def _ratios(sizes: Int[np.ndarray, "N 2"]) -> Float[np.ndarray, " N"]:
    ratios: Float[np.ndarray, " N"] = sizes[:, 0] / sizes[:, 1]
    return ratios


def _first_smallest(distances: Iterable[Float[np.ndarray, " N"]]) -> Int[np.ndarray, " N"]:
    """The number of the smallest distance; one row at a time, since data sets have millions of images."""
    best, smallest = np.zeros(0, np.int64), np.zeros(0)
    for number, distance in enumerate(distances):
        if number == 0:
            best, smallest = np.zeros(len(distance), np.int64), distance
        closer = distance < smallest
        best[closer] = number
        smallest = np.minimum(smallest, distance)
    return best
