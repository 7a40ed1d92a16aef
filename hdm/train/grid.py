"""The sample grid: the same held-out captions and the same noise through the whole run, as one picture."""

from pathlib import Path

import torch

from hdm.config.schema import RunConfig
from hdm.data.loader import validation_batches
from hdm.data.shards import Shards
from hdm.diffusion.generate import Generator
from hdm.model.backbone import Backbone
from hdm.pictures import sheet
from hdm.train.examples import Examples
from hdm.train.weak import load_weak


class SampleGrid:
    """Draws the first `sampling.grid` held-out captions."""

    def __init__(self, run: RunConfig, shards: Shards, examples: Examples, model: Backbone) -> None:
        self.run = run
        count = run.sampling.grid
        batches = validation_batches(run, shards, samples=count, batch_size=count) if count else ()
        self.captions = [caption for batch in batches for caption in batch.captions]
        encoders = {"text_encoder": examples.text_encoder, "autoencoder": examples.autoencoder}
        weak = load_weak(run, device=examples.device)
        self.generator = Generator(model, run=run, device=examples.device, weak=weak, **encoders)

    def draw(self, folder: Path, samples: int, *, write: bool = True) -> Path:
        """Draw the grid of this moment, and write it as a PNG below run `folder`: one of several processes does."""
        side = self.run.crop.size
        images = self.generator.images(self.captions, size=(side, side), seed=self.run.sampling.seed)
        path = folder / "samples" / f"samples-{samples:09d}.png"
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            sheet(pixels, self.captions).save(path)
        return path
