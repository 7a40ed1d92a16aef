"""The pictures of an exported pipeline beside those of our own sampler."""

import dataclasses
from pathlib import Path

import torch

from hdm.config.axes import AUTOENCODER, TEXT_ENCODER
from hdm.config.errors import CheckpointError
from hdm.config.schema import Precision
from hdm.diffusion.generate import Generator
from hdm.diffusion.sampler import EulerConfig, StepsConfig
from hdm.export.pipeline import DiffusionPipeline
from hdm.pictures import sheet
from hdm.train.checkpoint import Loaded

SEED = 0


def compare(loaded: Loaded, folder: Path, prompts: list[str]) -> tuple[Path, float]:
    """Draw `prompts` at the training size with the network in memory and with the pipeline that is read from `folder`, in fp32.

    Both take Euler's steps, as every pipeline does. Returns the picture, ours in the first column, and the largest absolute
    difference of two pixels in [0, 1]. Raises CheckpointError when the picture cannot be written.
    """
    steps = {field.name: getattr(loaded.run.sampler, field.name) for field in dataclasses.fields(StepsConfig)}
    train = dataclasses.replace(loaded.run.train, precision=Precision.fp32)
    run = dataclasses.replace(loaded.run, train=train, sampler=EulerConfig(**steps))
    cache, side = Path(run.cache), run.crop.size
    encoders = {
        "text_encoder": TEXT_ENCODER.build(run.text_encoder, cache=cache),
        "autoencoder": AUTOENCODER.build(run.autoencoder, cache=cache),
    }
    generator = Generator(loaded.model.float(), run=run, device="cpu", **encoders)
    ours = (generator.images(prompts, size=(side, side), seed=SEED) + 1) / 2

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, seed=SEED, height=side, width=side, output_type="pt").images
    difference = float((ours - theirs).abs().max())
    pairs = torch.stack([ours, theirs], dim=1).flatten(0, 1).mul(255).round().to(torch.uint8)
    labels = [f"{who}: {prompt}" for prompt in prompts for who in ("HDM-Lab", "diffusers")]
    path = folder / "compare.png"
    try:
        sheet(pairs, labels, columns=2).save(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path, difference
