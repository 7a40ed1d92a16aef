"""What the metrics look at: held-out captions with their real images, and generated images for the captions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor

from eval.pictures import Pictures
from hdm.config.axes import DATA
from hdm.config.errors import TrainingError
from hdm.config.schema import RunConfig
from hdm.data.loader import Batch, validation_batches, whole_batches
from hdm.data.shards import Shards
from hdm.files import replacing

GROUP = 64  # images that are drawn together, and kept in one file
_IN_MEMORY = 2**30  # bytes of real images; more are kept in files


@dataclass(kw_only=True, slots=True)
class CaptionedImages:
    """N real images: uint8 pixels, the view that each one is (see docs/architecture.md), whole captions.

    `numbers` are the images' places in the fixed order of the split, which key the noise of what is drawn for them.
    """

    pixels: Pictures | UInt8[Tensor, "N 3 H W"]
    views: Float[Tensor, "N 6"]
    captions: list[str]
    numbers: list[int] = field(default_factory=list)
    _digest: str = ""

    def __post_init__(self) -> None:
        self.pixels = Pictures.of(self.pixels)
        self.numbers = self.numbers or list(range(len(self.captions)))

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def pictures(self) -> Pictures:
        """The images."""
        return Pictures.of(self.pixels)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(images, H, W) of each part."""
        return [(len(part), part.shape[2], part.shape[3]) for part in self.pictures.parts()]

    @property
    def digest(self) -> str:
        """Of the pixels."""
        self._digest = self._digest or self.pictures.digest
        return self._digest

    @property
    def prompts_digest(self) -> str:
        """Of the captions, in order, and the views that they are drawn in."""
        content = "\n".join(self.captions).encode() + self.views.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def open_split(run: RunConfig, split: str) -> Shards:
    """The "train" or "val" samples of a run's data set; prepares them when needed."""
    shards: Shards = DATA.build(run.data).open(Path(run.datasets), split)
    return shards


def read_images(run: RunConfig, shards: Shards, samples: int, *, whole: bool = False) -> CaptionedImages:
    """At most `samples` images in a fixed order, with fixed crops or `whole` in their buckets, whatever the run's seed."""
    read = whole_batches if whole else validation_batches
    batches = read(run, shards, samples=samples, batch_size=GROUP)
    large = min(samples, len(shards)) * 3 * run.crop.size**2 > _IN_MEMORY
    folder = Path(run.cache) / "reference" / f"{shards.digest[:16]}-{run.crop.size}-{'whole' if whole else 'square'}"
    views, captions, numbers, parts = [], [], [], []
    for batch, part in _kept(batches, folder if large else None):
        parts.append(part)
        views.append(batch.view)
        captions += batch.captions
        numbers += batch.index
    return CaptionedImages(pixels=Pictures(parts), views=torch.cat(views), captions=captions, numbers=numbers)


def _kept(batches: Iterator[Batch], folder: Path | None) -> Iterator[tuple[Batch, Tensor | Path]]:
    """Each batch with its bytes, in memory or in a file of `folder`."""
    for number, batch in enumerate(batches):
        pixels = to_bytes(batch.pixels)
        if folder is None:
            yield batch, pixels
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:05d}.safetensors"
        with replacing(path) as partial:
            save_file({"images": pixels}, partial)
        yield batch, path


def to_bytes(pixels: Float[Tensor, "N 3 H W"]) -> UInt8[Tensor, "N 3 H W"]:
    """[-1, 1] to 0 … 255. Raises TrainingError for pixels that are not finite."""
    if not torch.isfinite(pixels).all():
        bad = int((~torch.isfinite(pixels)).flatten(1).any(dim=1).sum())
        raise TrainingError(
            f"{bad} of {len(pixels)} images hold NaN or infinite pixels and cannot be measured; evaluate an earlier checkpoint,"
            " weights=raw, or with train.precision=fp32"
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def weights_digest(model: torch.nn.Module) -> str:
    """Sixteen hex digits of every tensor of a model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
