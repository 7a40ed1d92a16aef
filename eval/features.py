"""Image features for the distances, cached by the digest of images, extractor and weights."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from eval.extractor import Extractor
from eval.pictures import Pictures
from eval.threads import in_parallel
from hdm.cli import progress
from hdm.files import locked, replacing


def features(
    pixels: Pictures | Tensor, extractor: Extractor, *, cache: Path, device: torch.device, title: str
) -> NDArray[np.float64]:
    """Features (N, D) of uint8 images, with a progress bar; from the cache when they are there.

    The first process that needs them computes them, the others wait for it.
    """
    pictures = Pictures.of(pixels)
    recipe = hashlib.blake2b(repr(extractor.facts()).encode(), digest_size=8).hexdigest()
    path = cache / "features" / f"{pictures.digest}-{extractor.name}-{recipe}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), waiting=f"{title}: another process computes their features; waiting for it"):
        try:
            return load_file(path)["features"].astype(np.float64)
        except (OSError, SafetensorError):
            pass  # not there, or cut short by a crash
        found = _extracted(pictures, extractor, device=device, title=title)
        single = found.astype(np.float32)
        with replacing(path) as partial:  # networks compute in single precision: nothing is lost
            save_file({"features": single if np.array_equal(single, found) else found}, partial)
    return found


def _extracted(pictures: Pictures, extractor: Extractor, *, device: torch.device, title: str) -> NDArray[np.float64]:
    rows: list[Tensor] = []
    total = sum(len(part) for part in pictures.parts())
    with progress(f"{title}: features", total, "images") as advance, on_device(device):
        network = extractor.network(device)
        batches = pictures.batches(extractor.batch)
        for vectors in in_parallel(lambda images: network(images.to(device)).double().cpu(), batches, device=device):
            rows.append(vectors)
            advance(len(vectors))
    return torch.cat(rows).numpy()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """torch-fidelity says "cuda" and means the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
