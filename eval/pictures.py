"""Sets of images that need not fit in memory, nor be of one size."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor

from hdm.config.errors import DataError

Part = Tensor | Path


class Pictures:
    """N uint8 RGB images in parts, each (n, 3, H, W) of one size: a tensor, or a file of safetensors with `images`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Raises DataError for tensors that are no such images."""
        self.parts_ = list(parts)
        for part in self.parts_:
            if isinstance(part, Tensor):
                _check(part)

    @classmethod
    def of(cls, pixels: "Pictures | Tensor") -> "Pictures":
        """`pixels` as a set of pictures."""
        return pixels if isinstance(pixels, Pictures) else cls([pixels])

    def parts(self) -> Iterator[UInt8[Tensor, "n 3 H W"]]:
        """One after the other, as they are kept."""
        for part in self.parts_:
            yield part if isinstance(part, Tensor) else load_file(part)["images"]

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "n 3 H W"]]:
        """`size` images at a time wherever consecutive ones are of one size: the same batches however the set is kept."""
        held: Tensor | None = None
        for part in self.parts():
            if held is not None and held.shape[2:] != part.shape[2:]:
                yield held
                held = None
            held = part if held is None else torch.cat([held, part])
            while len(held) >= size:
                yield held[:size]
                held = held[size:]
            held = held if len(held) else None
        if held is not None:
            yield held

    def first(self, count: int) -> list[UInt8[Tensor, "3 H W"]]:
        """The first `count` images."""
        found: list[Tensor] = []
        for part in self.parts():
            found += list(part[: count - len(found)])
            if len(found) == count:
                break
        return found

    def take(self, numbers: Sequence[int]) -> list[UInt8[Tensor, "3 H W"]]:
        """The images of these numbers."""
        wanted, start = set(numbers), 0
        found: dict[int, Tensor] = {}
        for part in self.parts():
            found |= {i: part[i - start] for i in wanted if start <= i < start + len(part)}
            start += len(part)
        return [found[i] for i in numbers]

    @property
    def digest(self) -> str:
        """Of the pixels and sizes, however they are split into parts."""
        digest = hashlib.blake2b(digest_size=16)
        shapes: list[list[int]] = []
        for part in self.parts():
            digest.update(part.contiguous().numpy().tobytes())
            if shapes and shapes[-1][1:] == list(part.shape[1:]):
                shapes[-1][0] += len(part)
            else:
                shapes.append(list(part.shape))
        digest.update(";".join(",".join(map(str, shape)) for shape in shapes).encode())
        return digest.hexdigest()


def _check(pixels: Tensor) -> None:
    if pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3:
        return
    shape, kind = "x".join(map(str, pixels.shape)), str(pixels.dtype).removeprefix("torch.")
    hint = ""
    if pixels.ndim == 4 and pixels.shape[-1] == 3:
        hint = "; the channels stand last, permute(0, 3, 1, 2) puts them second"
    elif pixels.is_floating_point():
        hint = "; the images hold NaN" if pixels.isnan().any() else "; eval.samples.to_bytes turns [-1, 1] into bytes"
    raise DataError(f"images of shape {shape} and type {kind}: metrics take uint8 of shape N x 3 x H x W (RGB){hint}")
