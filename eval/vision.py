"""DINOv2 and CLIP as feature extractors of torch-fidelity, from safetensors in the format of the transformers library.

torch-fidelity's own ones download pickles from a hub. Preprocessing, which is part of the metric: Pillow's bicubic filter, as the
published evaluations use it (Stein et al., 2023, for DINOv2; Jayasumana et al., 2024, for CLIP), to a square of the network's
size, then the mean and deviation of the folder's preprocessor_config.json.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from eval.extractor import DINOV2_SIDE, Clip, Dinov2
from hdm import torchvision_cpu
from hdm.config.errors import AssetError

torchvision_cpu.declare()

from torch_fidelity import FeatureExtractorBase, register_feature_extractor  # noqa: E402 -- imports torchvision

_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class _Transformer(FeatureExtractorBase):  # type: ignore[misc]
    """One vector of a vision transformer per image."""

    layer: str

    def __init__(self, name: str, features_list: list[str], *, feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        from transformers.image_processing_base import ImageProcessingMixin

        facts, _ignored = ImageProcessingMixin.get_image_processor_dict(feature_extractor_weights_path, **_OPTIONS)
        self.net = self.read(feature_extractor_weights_path)
        for key in ("image_mean", "image_std"):
            self.register_buffer(key, torch.tensor(facts[key]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def read(self, path: str) -> Any:
        """The network in `path`."""
        raise NotImplementedError

    def side(self) -> int:
        """The pixels that it sees, along either side."""
        raise NotImplementedError

    def embed(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Its vector."""
        raise NotImplementedError

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        """The one layer."""
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:  # noqa: ARG003
        """The one layer, for every metric."""
        return cls.layer

    @staticmethod
    def can_be_compiled() -> bool:
        """Compiling takes longer than it saves."""
        return False

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D"]]:
        """Vectors of bytes."""
        x = resized(images, self.side()).to(images.device)
        return (self.embed((x - self.image_mean) / self.image_std).float(),)


def resized(images: UInt8[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 S S"]:
    """Values in [0, 1] at `side` x `side`, by Pillow's bicubic filter on bytes."""
    tiles = [
        np.asarray(Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC))
        for image in images.cpu().permute(0, 2, 3, 1)
    ]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255


class Dinov2Features(_Transformer):
    """The class token behind the last norm."""

    layer = Dinov2.layer

    def read(self, path: str) -> Any:  # noqa: D102
        import transformers

        return transformers.Dinov2Model.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **_OPTIONS)

    def side(self) -> int:  # noqa: D102
        return min(DINOV2_SIDE, int(self.net.config.image_size))

    def embed(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:  # noqa: D102
        states: Tensor = self.net(pixel_values=x).last_hidden_state
        return states[:, 0]


class ClipFeatures(_Transformer):
    """The image embedding, of length one."""

    layer = Clip.layer

    def read(self, path: str) -> Any:  # noqa: D102
        import transformers

        return transformers.CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **_OPTIONS)

    def side(self) -> int:  # noqa: D102
        return int(self.net.config.vision_config.image_size)

    def embed(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:  # noqa: D102
        states = self.net.vision_model(pixel_values=x).pooler_output
        return torch.nn.functional.normalize(self.net.visual_projection(states), dim=-1)


register_feature_extractor(Dinov2.registered, Dinov2Features)
register_feature_extractor(Clip.registered, ClipFeatures)


def found(path: str, *, key: str, what: str) -> Path:
    """The folder with config.json, preprocessor_config.json and *.safetensors. Raises AssetError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise AssetError(
                f"{key}={path}: no {what} in this folder or in the hub's cache; run `hf download {path}` where there is a network,"
                f" or set {key}=FOLDER"
            ) from None
    for name in ("config.json", "preprocessor_config.json", "*.safetensors"):
        if not list(folder.glob(name)):
            raise AssetError(f"{key}={path}: has no {name}; give a folder in the format of the transformers library")
    return folder
