"""The frozen network between pixels (B, 3, H, W) in [-1, 1] and the latents (B, C, h, w) that a backbone learns.

Latents leave here normalised per channel, z = (z' - mean) / std, with the figures of the network's own configuration
(spec 1.4), in float32 whatever the network computes in.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.conditioning.weights import Source, compiling, read_network, torch_dtype
from hdm.config.axes import AUTOENCODER
from hdm.config.errors import ConfigError
from hdm.config.registry import option
from hdm.config.schema import Dtype, RunConfig, Storage


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """What every autoencoder declares."""

    channels: int = option(4, "channels C of a latent")
    factor: int = option(8, "pixels per latent, along each side")


@dataclass(kw_only=True, slots=True)
class PretrainedAutoencoderConfig(AutoencoderConfig):
    """An autoencoder with weights."""

    path: str = option("", "folder (config.json, *.safetensors) or hub id")
    revision: str | None = option(None, "commit, tag or branch on the hub; null is the newest, or what is cached")
    dtype: Dtype = option(Dtype.auto, "arithmetic of the autoencoder; auto is bf16 on an accelerator, fp32 on the CPU")
    chunk: int = option(4, "images per pass: bounds the memory, does not change the result")
    compile: bool = option(False, "torch.compile; pays off in long runs on an accelerator")
    cache: Storage = option(
        Storage.none, "read posteriors of training crops from the disk, kept as fp32, bf16 or fp16: python -m hdm.cache fills it"
    )

    def check(self, run: RunConfig) -> None:
        """All sizes are positive; what is cached can be listed."""
        for name in ("channels", "factor", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"autoencoder.{name}={getattr(self, name)}: must be above 0")
        if self.cache is Storage.none:
            return
        if "square" in getattr(run.crop, "takes", {}):
            raise ConfigError(
                f"autoencoder.cache={self.cache.value}: the windows of this crop depend on the batch ({run.crop.takes['square']});"
                " use crop=shifted_square crop.places=4 or crop=center, or set autoencoder.cache=none"
            )
        if run.crop.places is None:
            raise ConfigError(
                f"autoencoder.cache={self.cache.value}: an image has a crop for every pixel of its long side, too many to keep;"
                " set crop.places=4 (the squares at the ends and two between), use crop=center, or set autoencoder.cache=none"
            )


class Autoencoder(ABC):
    """Pixels to latents and back."""

    def __init__(self, config: AutoencoderConfig, *, cache: Path, device: torch.device | str = "cpu") -> None:
        self.config, self.cache, self.device = config, cache, torch.device(device)

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"] | None) -> Float[Tensor, "B C h w"]:
        """Latents of `pixels`.

        Standard normal `noise` draws from the posterior, None takes its mode. Where there is no posterior, noise is ignored.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels of `latents`, limited to [-1, 1]."""


# --- no network -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class PixelConfig(AutoencoderConfig):
    """No autoencoder: the latents are the pixels."""

    channels: int = option(3, "always 3")
    factor: int = option(1, "always 1")

    def check(self, _: RunConfig) -> None:
        """Both are fixed."""
        for name, value in (("channels", 3), ("factor", 1)):
            if getattr(self, name) != value:
                raise ConfigError(f"autoencoder.{name}={getattr(self, name)}: is {value} for autoencoder=pixel; leave it out")


@AUTOENCODER.register("pixel", PixelConfig)
class Pixel(Autoencoder):
    """The identity."""

    def encode(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        noise: Float[Tensor, "B C h w"] | None,
    ) -> Float[Tensor, "B 3 H W"]:
        """The pixels."""
        return pixels

    def decode(self, latents: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The latents, limited to [-1, 1]."""
        return latents.clamp(-1, 1)


# --- networks of the diffusers library --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Posterior:
    """What an encoder says of B images, before normalisation, in float32; `std` is None where it is sure."""

    mean: Float[Tensor, "B C h w"]
    std: Float[Tensor, "B C h w"] | None

    def draw(self, noise: Float[Tensor, "B C h w"] | None) -> Float[Tensor, "B C h w"]:
        """Mean + std * noise; the mean without noise, or without a std."""
        return self.mean if noise is None or self.std is None else self.mean + self.std * noise


class PretrainedAutoencoder(Autoencoder):
    """An autoencoder in the format of the diffusers library."""

    network_class: str
    config: PretrainedAutoencoderConfig

    def __init__(self, config: PretrainedAutoencoderConfig, *, cache: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(config, cache=cache, device=device)
        self.dtype = torch_dtype(config.dtype, self.device)
        self.network = Source(axis="autoencoder", path=config.path, revision=config.revision).load(self._read)
        for name, actual in (("channels", self.network.config.latent_channels), ("factor", self.downsampling())):
            given = getattr(config, name)
            if given != actual:
                raise ConfigError(f"autoencoder.{name}={given}: {config.path} has {actual}; set autoencoder.{name}={actual}")
        self.network.to(self.device)
        if config.compile:
            self.network.encoder.compile()
            self.network.decoder.compile()
        self.mean, self.std = (t.to(self.device) for t in latent_statistics(self.network.config))

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"] | None) -> Float[Tensor, "B C h w"]:
        """In chunks of `config.chunk` images."""
        return self.normalised(self.posterior(pixels).draw(noise))

    @torch.no_grad()
    def posterior(self, pixels: Float[Tensor, "B 3 H W"]) -> Posterior:
        """What `pixels` are encoded to, in chunks of `config.chunk` images."""
        size = self.config.chunk
        with compiling("autoencoder", self.config.compile):
            parts = [self.read(pixels[i : i + size].to(self.dtype)) for i in range(0, len(pixels), size)]
        return Posterior(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.std for part in parts if part.std is not None]) if parts[0].std is not None else None,
        )

    def normalised(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Latents as a backbone learns them, by channel."""
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """In chunks of `config.chunk` images."""
        size = self.config.chunk
        raw = (latents * self.std + self.mean).to(self.dtype)
        with compiling("autoencoder", self.config.compile):
            pixels = [self.network.decode(raw[i : i + size]).sample.float() for i in range(0, len(raw), size)]
        return torch.cat(pixels).clamp(-1, 1)

    @abstractmethod
    def read(self, pixels: Float[Tensor, "B 3 H W"]) -> Posterior:
        """What one chunk is encoded to."""

    @abstractmethod
    def downsampling(self) -> int:
        """Pixels per latent of the loaded network."""

    def _read(self, path: str, **options: Any) -> Any:
        from hdm import torchvision_cpu

        torchvision_cpu.declare()
        import diffusers

        return read_network(getattr(diffusers, self.network_class), path, torch_dtype=self.dtype, **options)


def latent_statistics(network: Any) -> tuple[Float[Tensor, "1 C 1 1"], Float[Tensor, "1 C 1 1"]]:
    """Mean and standard deviation that normalise latents, from a network's configuration.

    `latents_mean` and `latents_std`, one figure per channel; where it has none, `shift_factor` and 1 / `scaling_factor`.
    """
    mean = getattr(network, "latents_mean", None) or [getattr(network, "shift_factor", None) or 0.0] * network.latent_channels
    std = getattr(network, "latents_std", None) or [1.0 / network.scaling_factor] * network.latent_channels
    return torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)


@dataclass(kw_only=True, slots=True)
class KLConfig(PretrainedAutoencoderConfig):
    """A KL autoencoder of the Stable Diffusion family: the report's EQ-SDXL-VAE (f8c4) unless another is named."""

    path: str = option("KBlueLeaf/EQ-SDXL-VAE", "folder (config.json, *.safetensors) or hub id")


@AUTOENCODER.register("kl", KLConfig)
class KL(PretrainedAutoencoder):
    """Rombach et al., 2022: a diagonal Gaussian per latent; training draws from it (spec 1.4)."""

    network_class = "AutoencoderKL"

    def read(self, pixels: Float[Tensor, "B 3 H W"]) -> Posterior:
        """Mean and standard deviation of a Gaussian."""
        gaussian = self.network.encode(pixels).latent_dist
        return Posterior(gaussian.mean.float(), gaussian.std.float())

    def downsampling(self) -> int:
        """Every level but the last halves the sides."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))


@dataclass(kw_only=True, slots=True)
class DCAEConfig(PretrainedAutoencoderConfig):
    """A deep-compression autoencoder, f32c32 unless another is named: few tokens with many channels, for model.patch=1."""

    channels: int = option(32, "channels C of a latent")
    factor: int = option(32, "pixels per latent, along each side")
    path: str = option("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "folder (config.json, *.safetensors) or hub id")


@AUTOENCODER.register("dc_ae", DCAEConfig)
class DCAE(PretrainedAutoencoder):
    """Chen et al., 2024; deterministic (spec 7)."""

    network_class = "AutoencoderDC"

    def read(self, pixels: Float[Tensor, "B 3 H W"]) -> Posterior:
        """The code itself."""
        return Posterior(self.network.encode(pixels).latent.float(), None)

    def downsampling(self) -> int:
        """As the network says."""
        return int(self.network.spatial_compression_ratio)
