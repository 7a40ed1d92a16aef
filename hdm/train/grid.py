"""The sample grid: the same held-out captions and the same noise through the whole run, as one picture."""

from pathlib import Path

import torch

from hdm.config.schema import RunConfig
from hdm.data.loader import validation_batches
from hdm.data.shards import Shards
from hdm.diffusion.generate import Generator
from hdm.files import write_json
from hdm.model.backbone import Backbone
from hdm.pictures import sheet
from hdm.train.examples import Examples
from hdm.train.parallel import World
from hdm.train.weak import load_weak


class SampleGrid:
    """Draws the first `sampling.grid` held-out captions."""

    def __init__(self, run: RunConfig, shards: Shards, examples: Examples, model: Backbone, *, world: World | None = None) -> None:
        self.run, self.world = run, world or World()
        count = run.sampling.grid
        batches = validation_batches(run, shards, samples=count, batch_size=count) if count else ()
        self.captions = [caption for batch in batches for caption in batch.captions]
        encoders = {"text_encoder": examples.text_encoder, "autoencoder": examples.autoencoder}
        weak = load_weak(run, device=examples.device)
        self.generator = Generator(model, run=run, device=examples.device, weak=weak, **encoders)

    def write_captions(self, folder: Path) -> Path:
        """Keep the captions, in order, as JSON below run `folder`: a picture's words are hard to read for a program."""
        path = folder / "samples" / "captions.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.captions)
        return path

    def draw(self, folder: Path, samples: int) -> Path:
        """Draw the grid of this moment and write it as a PNG below run `folder`. Of several processes each draws a share, as many
        pictures as the others, and the first one writes."""
        side, (rank, size) = self.run.crop.size, self.world.part
        share = -(-len(self.captions) // size)
        mine = [i % len(self.captions) for i in range(rank * share, (rank + 1) * share)]
        captions = [self.captions[i] for i in mine]
        images = self.generator.images(captions, size=(side, side), seed=self.run.sampling.seed, indices=mine)
        drawn = self.world.gathered(images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
        path = folder / "samples" / f"samples-{samples:09d}.png"
        if self.world.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet(torch.cat(drawn)[: len(self.captions)], self.captions).save(path)
        return path
