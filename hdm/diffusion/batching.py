"""How many images go through a network together where nothing is trained: a matter of their size and the device alone.

Libraries choose kernels, and with them the order of summation, by the shape of the whole batch. The last bits of an image hence
depend on how many others it is computed with, and where one of its pixels lies on the boundary of two bytes, the byte does. So no
option sets this number: what is drawn and measured is the same for any `sampling.batch_size` and `validation.batch_size`, which say
how many images are held at once.
"""

from collections.abc import Iterator

import torch

TOKENS = 8192  # twice that with guidance; 2 images of 1024 px, 32 of 256 px: enough to fill a GPU, and a small one holds them
CPU_TOKENS = 1024  # a core is as fast with few, and others find something to do


def images_per_pass(grid: tuple[int, int], device: torch.device) -> int:
    """Images of `grid` (rows, columns) tokens in one pass."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else TOKENS) // (grid[0] * grid[1]))


def whole_passes(images: int, per_pass: int) -> int:
    """`images` rounded up to whole passes."""
    return -(-images // per_pass) * per_pass


def passes(images: range, per_pass: int) -> Iterator[slice]:
    """The passes of consecutive `images`; the last one is smaller where they do not fill it."""
    return (slice(start, min(start + per_pass, images.stop)) for start in images[::per_pass])
