"""EfficientNet-Lite0 as a feature extractor of torch-fidelity: 1280 numbers per image, ImageNet weights that a package carries.

Preprocessing, which is part of the metric: RGB bytes are resized to 128 x 128 by bicubic interpolation with antialiasing
(`torch.nn.functional.interpolate`, `align_corners=False`), clamped to [0, 255], then normalised as (x - 127) / 128, the constants
that these weights were trained with. Against ImageNet's 224, 128 pixels cost a sixth of the time on a CPU and rank captions nearly
as well (docs/evaluation.md).
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from hdm import torchvision_cpu

torchvision_cpu.declare()

from torch_fidelity import FeatureExtractorBase, register_feature_extractor  # noqa: E402 -- imports torchvision

FIDELITY_NAME = "efficientnet-lite0"
SIZE = 128
PREPROCESSING = f"{SIZE} px, bicubic with antialiasing, (x - 127) / 128"


class EfficientNetLite0(FeatureExtractorBase):  # type: ignore[misc]
    """The mean over positions of the last convolution's output."""

    def __init__(self, name: str, features_list: list[str], *, feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True))
        self.net.to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU
        self.requires_grad_(False).eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The one layer."""
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:  # noqa: ARG004
        """The one layer, for every metric."""
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        """Compiling takes longer than it saves."""
        return False

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 1280"]]:
        """Features in double precision, in which KID's cubes keep their digits."""
        x = (resized(images) - 127.0) / 128.0
        maps = self.net.extract_features(x.contiguous(memory_format=torch.channels_last))
        return (maps.mean(dim=(2, 3)).double(),)


def resized(images: UInt8[Tensor, "B 3 H W"], side: int = SIZE) -> Float[Tensor, "B 3 S S"]:
    """Values in [0, 255] at `side` x `side`, never rounded to bytes: the resizing that clean-fid asks for (Parmar et al., 2022)."""
    x = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 255)


register_feature_extractor(FIDELITY_NAME, EfficientNetLite0)
