"""What the metrics look at: held-out captions with their real images, and one generated image for each caption."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.features import image_digest
from hdm.cli import progress
from hdm.config.axes import AUTOENCODER, DATA, TEXT_ENCODER
from hdm.config.schema import RunConfig
from hdm.data.loader import validation_batches
from hdm.data.shards import Shards
from hdm.diffusion.generate import Generator, Network
from hdm.files import replacing
from hdm.model.backbone import Backbone


@dataclass(kw_only=True, slots=True)
class CaptionedImages:
    """N real images at the run's crop size: uint8 pixels, the view that each one is (see docs/architecture.md), whole captions."""

    pixels: UInt8[Tensor, "N 3 H W"]
    views: Float[Tensor, "N 6"]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def digest(self) -> str:
        """Of the pixels."""
        return image_digest(self.pixels)

    @property
    def prompts_digest(self) -> str:
        """Of the captions, in order, and the views that they are drawn in."""
        content = "\n".join(self.captions).encode() + self.views.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def open_split(run: RunConfig, split: str) -> Shards:
    """The "train" or "val" samples of a run's data set; prepares them when needed."""
    shards: Shards = DATA.build(run.data).open(Path(run.datasets), split)
    return shards


def read_images(run: RunConfig, shards: Shards, samples: int) -> CaptionedImages:
    """At most `samples` images in a fixed order, with fixed crops, whatever the run's seed."""
    batches = list(validation_batches(run, shards, samples=samples, batch_size=64))
    return CaptionedImages(
        pixels=torch.cat([to_bytes(batch.pixels) for batch in batches]),
        views=torch.cat([batch.view for batch in batches]),
        captions=[caption for batch in batches for caption in batch.captions],
    )


def to_bytes(pixels: Float[Tensor, "N 3 H W"]) -> UInt8[Tensor, "N 3 H W"]:
    """[-1, 1] to 0 … 255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def generated(
    model: Backbone, run: RunConfig, real: CaptionedImages, *, folder: Path, device: torch.device, weak: Network | None = None
) -> UInt8[Tensor, "N 3 H W"]:
    """One image for each caption and view of `real`; kept in `folder` under the digest of the weights for the next call.

    `weak` is the other network of guidance=autoguidance.
    """
    path = folder / f"samples-{weights_digest(model)}.safetensors"
    try:
        return load_file(path)["images"]
    except (OSError, SafetensorError):
        pass  # not there, or cut short by a crash
    generator = Generator(
        model.to(device),
        run=run,
        text_encoder=TEXT_ENCODER.build(run.text_encoder, cache=Path(run.cache), device=device),
        autoencoder=AUTOENCODER.build(run.autoencoder, cache=Path(run.cache), device=device),
        device=device,
        weak=weak,
    )
    parts = []
    with progress("generated images", len(real), "images") as advance:
        for start in range(0, len(real), run.sampling.batch_size):
            rows = slice(start, start + run.sampling.batch_size)
            images = generator.images(
                real.captions[rows],
                size=real.size,
                seed=run.eval.seed,
                indices=range(len(real))[rows],
                views=real.views[rows],
                on_step=lambda n: advance(n / generator.sampler.evaluations),
            )
            parts.append(to_bytes(images))
    images = torch.cat(parts)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file({"images": images}, partial)
    return images


def weights_digest(model: torch.nn.Module) -> str:
    """Sixteen hex digits of every tensor of a model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
