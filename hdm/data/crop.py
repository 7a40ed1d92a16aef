"""Crops: how images of any aspect ratio become a batch of one size.

An image is resized to cover a box and a window is cut out. The model is told what it sees: the *view*, the window together with the
image that it was cut from, becomes the position map, and log(width / height) of the whole image is a condition of its own (report,
"Shifted Square Crop"; spec 9 and 1.3 j). Images smaller than the crop are enlarged: leaving them out would change which images a
run sees from one crop size to the next.

Held-out images are cut to the square of side `size` whatever the variant, so that a variant's validation loss answers the same
question; only `center` puts the square elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm.config.axes import CROP
from hdm.config.check import require
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.data.buckets import hdm_sizes, nai_table, nearest_ratio, nearest_shape, pixart_table
from hdm.data.images import Decoded, covering
from hdm.data.order import SQUARE, BucketOrder, CycledOrder, DrawnOrder, Order
from hdm.data.shards import Shards


class BucketLaw(Enum):
    """Which sizes `crop=arb` cuts images to (spec 9)."""

    hdm = "hdm"
    nai = "nai"
    pixart = "pixart"


@dataclass(kw_only=True, slots=True)
class ShiftedSquareConfig:
    """A square window at a random place along the long side, the last place included (report, "Shifted Square Crop")."""

    size: int = option(256, "side of the crop in pixels; the short side of the image is resized to it")
    places: int | None = option(
        None, "places along a side that a window can have, evenly spaced, both ends included; null: every one"
    )

    def check(self, run: RunConfig) -> None:
        """The crop must be a whole number of patches."""
        require(self.places is None or self.places > 0, f"crop.places={self.places}: must be above 0, or null for every place")
        cell = run.autoencoder.factor * run.model.patch
        require(
            self.size > 0 and self.size % cell == 0,
            f"crop.size={self.size}: is not a positive multiple of autoencoder.factor x model.patch = {run.autoencoder.factor} x"
            f" {run.model.patch} = {cell}; set crop.size={max(round(self.size / cell), 1) * cell}",
        )


@dataclass(kw_only=True, slots=True)
class CenterConfig(ShiftedSquareConfig):
    """The square window in the middle, the same one each time an image is seen (ADM, DiT)."""

    places: int | None = option(1, "always 1: the middle")
    hflip: float = option(0.0, "probability that an image is mirrored left to right first; ADM and DiT: 0.5")

    def check(self, run: RunConfig) -> None:
        """As the base class; a probability is one."""
        ShiftedSquareConfig.check(self, run)
        require(self.places == 1, f"crop.places={self.places}: crop=center has one; use crop=shifted_square, or leave it out")
        require(0 <= self.hflip <= 1, f"crop.hflip={self.hflip}: must be between 0 and 1")


@dataclass(kw_only=True, slots=True)
class PatchDiffusionConfig(ShiftedSquareConfig):
    """Windows of the whole, half or a quarter of `size` at random places, one size a micro-batch (Patch Diffusion, 2304.12526).

    On latents the paper has no quarter: crop.half=0.5 crop.quarter=0. It also puts 2 and 4 times as many images into batches of
    small windows. Here every step is train.batch_size samples: else the sample at which a step begins would depend on the draws
    before it, and no other crop could be paired with it. A step's loss is a mean over samples, so the expected gradient is the
    paper's; only its variance differs, and train.accumulation lowers it, as each micro-batch draws its window.
    """

    takes: ClassVar[dict[str, str]] = {"square": "micro-batches differ in the size of their windows"}

    full: float = option(0.5, "probability of windows of crop.size")
    half: float = option(0.3, "probability of windows of half of it")
    quarter: float = option(0.2, "probability of windows of a quarter of it")

    def check(self, run: RunConfig) -> None:
        """Probabilities that add up, and windows of whole patches."""
        ShiftedSquareConfig.check(self, run)
        cell = run.autoencoder.factor * run.model.patch
        for name, share, part in (("full", self.full, 1), ("half", self.half, 2), ("quarter", self.quarter, 4)):
            require(0 <= share <= 1, f"crop.{name}={share}: must be between 0 and 1")
            require(
                share == 0 or self.size % (part * cell) == 0,
                f"crop.{name}={share}: windows of {self.size}/{part} pixels are no multiple of autoencoder.factor x model.patch ="
                f" {cell}; set crop.size={math.ceil(self.size / (part * cell)) * part * cell}, or crop.{name}=0 and others higher",
            )
        total = self.full + self.half + self.quarter
        require(
            abs(total - 1) < 1e-6,
            f"crop.full={self.full}: with crop.half={self.half} and crop.quarter={self.quarter} it adds up to {total:g}, not 1; the"
            " paper's are 0.5, 0.3 and 0.2",
        )


@dataclass(kw_only=True, slots=True)
class ArbConfig(ShiftedSquareConfig):
    """Aspect-ratio buckets of about size x size pixels, by the law of HDM, NAI/Chroma or PixArt.

    Micro-batches are of one bucket each. Nothing is dropped: what they leave over becomes shifted squares. With `balanced` every
    ratio that has enough images is seen equally often instead, however many it has, and the others never.
    """

    takes: ClassVar[dict[str, str]] = {"square": "batches have the aspect ratios of their images"}

    law: BucketLaw = option(BucketLaw.hdm, "hdm: each image its own size; nai, pixart: the nearest of a table")
    step: int | None = option(None, "sides are multiples of it; null: 16 (hdm), 64 (nai), size / 16 (pixart), at most size / 4")
    cutoff: float | None = option(
        None, "images whose long side is that many times the short one become shifted squares; null: 2 for nai, none for the others"
    )
    balanced: int | None = option(
        None,
        "micro-batches cycle through the buckets that have this many images or more, PixArt: 3000; null: every image once an epoch",
    )

    def side_step(self) -> int:
        """The step, with the default of the law."""
        published = {BucketLaw.hdm: 16, BucketLaw.nai: 64, BucketLaw.pixart: self.size // 16}[self.law]
        return max(min(published, self.size // 4), 1) if self.step is None else self.step

    def check(self, run: RunConfig) -> None:
        """Buckets must be whole numbers of patches."""
        ShiftedSquareConfig.check(self, run)
        cell, step = run.autoencoder.factor * run.model.patch, self.side_step()
        near = min(max(round(step / cell), 1) * cell, self.size)
        require(
            0 < step <= self.size and step % cell == 0,
            f"crop.step={step}: must be at most crop.size={self.size} and a multiple of autoencoder.factor x model.patch ="
            f" {run.autoencoder.factor} x {run.model.patch} = {cell}; set crop.step={near}",
        )
        require(self.cutoff is None or self.cutoff > 1, f"crop.cutoff={self.cutoff}: must be above 1, or null for none")
        require(
            self.balanced is None or self.balanced > 0,
            f"crop.balanced={self.balanced}: must be above 0, such as PixArt's 3000, or null for every image once an epoch",
        )


@dataclass(frozen=True, slots=True)
class Cropped:
    """A crop and what it was cut from.

    pixels: (height, width, 3), RGB. view: (image height, image width, top, left, height, width) in pixels of the resized image.
    aspect: log(width / height) of the whole image.
    """

    pixels: NDArray[np.uint8]
    view: tuple[int, int, int, int, int, int]
    aspect: float


class Crop:
    """Resizes an image to cover a box and cuts a window; variants decide which box, and where."""

    def __init__(self, config: ShiftedSquareConfig) -> None:
        self.size, self.count = config.size, config.places

    def places(self, room: int) -> Sequence[int]:
        """Where the window may start along one side: `crop.places` of 0, 1, … `room`, or all of them."""
        count = room + 1 if self.count is None else min(self.count, room + 1)
        if count == room + 1:
            return range(room + 1)
        return [round(i * room / (count - 1)) for i in range(count)] if count > 1 else [room // 2]

    def order(self, seed: int, shards: Shards, *, start: int, batch_size: int) -> Order:
        """Which record each sample is and how large the crops of each micro-batch are; micro-batches begin at `start`."""
        return Order(seed, len(shards), deck=shards.deck(seed))

    def covered(self, box: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) that the resized image covers when windows of `box` are cut; None: the square."""
        return box or (self.size, self.size)

    def augmented(self, source: Decoded, rng: np.random.Generator) -> Decoded:
        """What training makes of an image before it is cut. Held-out images are left as they are."""
        return source

    def versions(self, source: Decoded) -> Sequence[Decoded]:
        """Everything that `augmented` can make of an image."""
        return [source]

    def squares(self, source: Decoded) -> Iterator[Cropped]:
        """Every square that training can be given of an image."""
        for version in self.versions(source):
            full_width, full_height = covering(version.width, version.height, self.covered(None))
            for top in self.places(full_height - self.size):
                for left in self.places(full_width - self.size):
                    yield self.cut(version, (self.size, self.size), corner=(top, left), covered=self.covered(None))

    def __call__(self, source: Decoded, rng: np.random.Generator, box: tuple[int, int] | None = None) -> Cropped:
        """Cut the window of `box`, (height, width), that `rng` chooses; None: the square."""
        height, width = box or (self.size, self.size)
        covered = self.covered(box)
        full_width, full_height = covering(source.width, source.height, covered)
        top, left = (self._drawn(self.places(room), rng) for room in (full_height - height, full_width - width))
        return self.cut(source, (height, width), corner=(top, left), covered=covered)

    def _drawn(self, places: Sequence[int], rng: np.random.Generator) -> int:
        return places[int(rng.integers(len(places)))] if len(places) > 1 else places[0]

    def cut(self, source: Decoded, box: tuple[int, int], *, corner: tuple[int, int], covered: tuple[int, int]) -> Cropped:
        """The window of `box`, (height, width), at `corner`, (top, left), of the image resized to cover `covered`."""
        image, (height, width), (top, left) = source.image, box, corner
        full_width, full_height = covering(source.width, source.height, covered)
        # Resampling only the window reads the same source pixels with the same weights as cutting it from the resized whole.
        across, down = image.width / full_width, image.height / full_height
        part = (
            left * across,
            top * down,
            min((left + width) * across, image.width),
            min((top + height) * down, image.height),
        )
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=part))
        view = (full_height, full_width, top, left, height, width)
        return Cropped(pixels=pixels, view=view, aspect=math.log(source.width / source.height))


@CROP.register("shifted_square", ShiftedSquareConfig)
class ShiftedSquare(Crop):
    """Uniform over every place, both ends included; the author's code leaves the last one out (spec 1.3 u)."""


@CROP.register("center", CenterConfig)
class Center(Crop):
    """The middle, rounded towards the top left; mirrored images are images in their own right, so no position is mirrored."""

    def __init__(self, config: CenterConfig) -> None:
        super().__init__(config)
        self.hflip = config.hflip

    def places(self, room: int) -> Sequence[int]:
        """Half of `room`."""
        return [room // 2]

    def augmented(self, source: Decoded, rng: np.random.Generator) -> Decoded:
        """Mirrored with probability `hflip`."""
        return self.mirrored(source) if rng.random() < self.hflip else source

    def versions(self, source: Decoded) -> Sequence[Decoded]:
        """As it is, and mirrored where that can happen."""
        return [*([source] if self.hflip < 1 else []), *([self.mirrored(source)] if self.hflip > 0 else [])]

    def mirrored(self, source: Decoded) -> Decoded:
        """Left to right."""
        image = source.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Decoded(image=image, width=source.width, height=source.height)


@CROP.register("patch_diffusion", PatchDiffusionConfig)
class PatchDiffusion(ShiftedSquare):
    """The image is resized as for the square, whatever the window: small windows see details, and the view says whose."""

    def __init__(self, config: PatchDiffusionConfig) -> None:
        super().__init__(config)
        self.shares = {1: config.full, 2: config.half, 4: config.quarter}

    def covered(self, box: tuple[int, int] | None) -> tuple[int, int]:
        """The square."""
        return self.size, self.size

    def order(self, seed: int, shards: Shards, *, start: int, batch_size: int) -> Order:
        """See `Crop.order`; a micro-batch's window is drawn from (seed, its first sample)."""
        shares = {part: share for part, share in self.shares.items() if share > 0}
        boxes = [(self.size // part, self.size // part) for part in shares]
        return DrawnOrder(seed, len(shards), boxes=boxes, shares=list(shares.values()), deck=shards.deck(seed))


@CROP.register("arb", ArbConfig)
class Arb(ShiftedSquare):
    """The image is resized to cover its bucket, and the little that stands over is cut at a random place."""

    def __init__(self, config: ArbConfig) -> None:
        super().__init__(config)
        self.law, self.step, self.cutoff, self.balanced = config.law, config.side_step(), config.cutoff, config.balanced
        if self.law is BucketLaw.nai and self.cutoff is None:
            self.cutoff = 2.0

    def order(self, seed: int, shards: Shards, *, start: int, batch_size: int) -> Order:
        """See `Crop.order`."""
        buckets, boxes = self.assigned(shards.sizes())
        if self.balanced is not None:
            return CycledOrder(
                seed, buckets, boxes=boxes, start=start, batch_size=batch_size, fewest=self.balanced, dealt=shards.deck
            )
        return BucketOrder(seed, buckets, boxes=boxes, start=start, batch_size=batch_size, deck=shards.deck(seed))

    def assigned(self, sizes: NDArray[np.integer]) -> tuple[NDArray[np.int64], Sequence[tuple[int, int]]]:
        """The bucket of each (width, height), SQUARE where it has none, and the buckets' (height, width)."""
        known = (sizes > 0).all(axis=1)
        if self.cutoff is not None:
            known &= sizes.max(axis=1) < self.cutoff * sizes.min(axis=1)
        buckets = np.full(len(sizes), SQUARE)
        if self.law is BucketLaw.hdm:
            own, buckets[known] = np.unique(hdm_sizes(sizes[known], self.size, self.step), axis=0, return_inverse=True)
            table = [(int(width), int(height)) for width, height in own]
        elif self.law is BucketLaw.nai:
            table = nai_table(self.size, self.step, self.cutoff or 2.0)
            buckets[known] = nearest_shape(sizes[known], table)
        else:
            table = pixart_table(self.size, self.step)
            buckets[known] = nearest_ratio(sizes[known], table)
        return buckets, [(height, width) for width, height in table]
