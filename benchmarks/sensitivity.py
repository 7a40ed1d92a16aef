"""Do the metrics order damage as they must? Real held-out images, damaged more and more, against the training images.

usage: python benchmarks/sensitivity.py [samples=256] [KEY=VALUE ...]

Blur, noise, JPEG, cropping, fewer kinds of images (mode drop) and shuffled captions, three levels each, with the extractor and
aligner that `eval.features` and `eval.alignment` choose. A row ends in yes when the metric is worse at every level than at the
one before, the undamaged images first. The table goes to docs/evaluation.md.
"""

import io
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from torch import Tensor

from eval import alignment, distribution
from eval.measure import Drawn
from eval.samples import CaptionedImages, open_split, read_images
from hdm import cli
from hdm.config.compose import compose
from hdm.train.loop import pick_device

Damage = Callable[[Image.Image, float], Image.Image]


def blur(image: Image.Image, level: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(level))


def noise(image: Image.Image, level: float) -> Image.Image:
    draw = np.random.default_rng(zlib.crc32(image.tobytes()))  # other noise on each picture, the same every time
    values = np.asarray(image, dtype=np.float64) + level * draw.standard_normal((image.height, image.width, 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, level: float) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(level))
    return Image.open(data).convert("RGB")


def crop(image: Image.Image, level: float) -> Image.Image:
    """The middle, `level` of a side, enlarged to the whole."""
    edge_y, edge_x = image.height * (1 - level) / 2, image.width * (1 - level) / 2
    box = (edge_x, edge_y, image.width - edge_x, image.height - edge_y)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


PIXELS: dict[str, tuple[Damage, tuple[float, float, float], str]] = {
    "blur": (blur, (0.5, 1.0, 2.0), "radius {:g} px"),
    "noise": (noise, (8, 24, 64), "standard deviation {:g}"),
    "JPEG": (jpeg, (75, 30, 10), "quality {:g}"),
    "crop": (crop, (0.9, 0.75, 0.5), "{:g} of a side"),
}
DROPS, SHUFFLES = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)


def damaged(pixels: Tensor, damage: Damage, level: float) -> Tensor:
    tiles = [damage(Image.fromarray(p.permute(1, 2, 0).numpy()), level) for p in pixels]
    return torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2)


def sets(pixels: Tensor) -> dict[str, list[tuple[str, Tensor, np.ndarray]]]:
    """For each kind of damage: label, images, and which image's caption each has, level by level, the undamaged first."""
    own = np.arange(len(pixels))
    found = {}
    for name, (damage, levels, words) in PIXELS.items():
        found[name] = [("none", pixels, own), *((words.format(v), damaged(pixels, damage, v), own) for v in levels)]
    dropped = [own % max(2, int(len(own) * share)) for share in DROPS]
    found["mode drop"] = [
        ("none", pixels, own),
        *((f"{share:g} of the images, repeated", pixels[rows], rows) for share, rows in zip(DROPS, dropped)),
    ]
    shuffled = []
    for share in SHUFFLES:
        rows, count = own.copy(), int(len(own) * share)
        rows[:count] = np.roll(rows[:count], 1)
        shuffled.append((f"{share:g} of them", pixels, rows))
    found["shuffled captions"] = [("none", pixels, own), *shuffled]
    return found


def command(arguments: list[str]) -> None:
    samples = int(cli.take_option(arguments, "samples") or 256)
    run = compose(["experiment=openmoji_nano", *arguments])
    run.eval.reference, run.eval.bootstrap = "train", 0
    device, console = pick_device(run.device), Console(quiet=True)
    real = read_images(run, open_split(run, "val"), samples)
    (pixels,) = [torch.cat(list(real.pictures.parts()))]
    base = Drawn(run=run, real=real, images=pixels, device=device, console=console)
    training, aligner = base.training, alignment.resolve(base)
    captions = aligner.embed_captions(real.captions)
    columns = ("fid", "kid", "precision", "recall", "density", "coverage", "alignment")
    worse = {"fid": 1, "kid": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1, "alignment": -1}
    print(f"{samples} held-out images of {Path(run.datasets)}, {len(training)} training images as reference\n")
    print(f"| damage | level | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for name, levels in sets(pixels).items():
        rows = []
        for label, images, owners in levels:
            drawn = Drawn(run=run, real=CaptionedImages(pixels=pixels, views=real.views, captions=real.captions), images=images,
                          device=device, console=console)  # fmt: skip
            drawn.reference = training
            values = distribution.measure(drawn, kinds=("fid", "kid", "prdc")).values
            found = {key.partition("/")[0]: value for key, value in values.items()}
            vectors = aligner.embed_images(images, label)
            found["alignment"] = aligner.score((vectors * captions[owners]).sum(axis=1))
            rows.append(found)
            print(f"| {name} | {label} | " + " | ".join(f"{found[c]:.3g}" for c in columns) + " |", flush=True)
        ordered = [all(worse[c] * (b[c] - a[c]) > 0 for a, b in itertools.pairwise(rows)) for c in columns]
        print(f"| {name} | worse at every level? | " + " | ".join("yes" if each else "no" for each in ordered) + " |", flush=True)


if __name__ == "__main__":
    cli.main(command, __doc__ or "")
