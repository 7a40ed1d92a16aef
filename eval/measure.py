"""What a metric is given and what it returns."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from eval import confidence
from eval.pictures import Pictures
from eval.samples import CaptionedImages, open_split, read_images
from hdm.config.schema import RunConfig

if TYPE_CHECKING:
    from hdm.train.checkpoint import Loaded

ALL = 10**9  # samples: as many as there are


@dataclass(kw_only=True)
class Drawn:
    """Generated images for the captions of the real ones, in the same order, round and round; None where none are needed.

    `console` is for what a person must know. `loaded` is the checkpoint, `folder` where pictures may be left; both are absent where
    images come from elsewhere.
    """

    run: RunConfig
    real: CaptionedImages
    images: Pictures | UInt8[Tensor, "N 3 H W"] | None
    device: torch.device
    console: Console
    loaded: "Loaded | None" = None
    folder: Path | None = None

    @property
    def cache(self) -> Path:
        """The folder for features and fitted maps."""
        return Path(self.run.cache)

    @cached_property
    def pictures(self) -> Pictures:
        """The generated images."""
        assert self.images is not None
        return Pictures.of(self.images)

    @cached_property
    def count(self) -> int:
        """The number of generated images."""
        return sum(len(part) for part in self.pictures.parts())

    @property
    def captions(self) -> list[str]:
        """The caption of each generated image."""
        return [self.real.captions[i % len(self.real)] for i in range(self.count)]

    @cached_property
    def reference(self) -> CaptionedImages:
        """The real images of a distance: the held-out ones, or with eval.reference=train all training images."""
        return self.training if self.run.eval.reference == "train" else self.real

    @cached_property
    def training(self) -> CaptionedImages:
        """All training images, as validation would cut them."""
        return read_images(self.run, open_split(self.run, "train"), ALL, whole=self.run.eval.whole)

    @cached_property
    def weights(self) -> NDArray[Any] | None:
        """Bootstrap weights over the generated images; None with eval.bootstrap=0."""
        rounds = self.run.eval.bootstrap
        return confidence.weights(self.count, rounds) if rounds > 1 else None


@dataclass(kw_only=True, slots=True)
class Measured:
    """Numbers by name, their sampling errors where known, and the part of the protocol that is the metric's own."""

    values: dict[str, float]
    protocol: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
