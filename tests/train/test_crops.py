"""Every crop through the real loop: batches of several sizes, resumed to the bit, every sample weighing the same."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from squares import NANO, Listener

from hdm.config.axes import CROP, DATA, OBJECTIVE, discover
from hdm.config.compose import compose
from hdm.data.loader import training_batches
from hdm.model import Architecture, build
from hdm.model.flops import count_flops
from hdm.train import loop
from hdm.train.examples import Examples
from hdm.train.loop import train

SHAPES = [(40, 20), (20, 40), (30, 30), (36, 24)]
COMMON = [*NANO, "train.accumulation=2", "schedule=constant", "validation.samples=3", "optimizer.lr=0.05"]
discover()
CROPS = [*CROP.names(), "arb crop.law=nai", "arb crop.law=pixart crop.step=4", "center crop.hflip=0.5"]


@pytest.fixture(autouse=True)
def oblong_shards():
    """Images of four shapes."""
    Path("shards").mkdir()
    for name, count in (("train", 29), ("val", 5)):
        draw = np.random.default_rng(count)
        with tarfile.open(f"shards/{name}.tar", "w") as tar:
            for i in range(count):
                width, height = SHAPES[i % 4]
                png = io.BytesIO()
                Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(png, "PNG")
                for suffix, content in ((".png", png.getvalue()), (".txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(f"{i:04d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def run_of(crop, *overrides):
    return compose([*COMMON, *f"crop={crop}".split(), *overrides])


@pytest.mark.parametrize("crop", CROPS)
def test_a_run_goes_on_to_the_bit(tmp_path, crop):
    straight = train(run_of(crop, "budget.steps=10"), tmp_path / "straight", Listener())
    train(run_of(crop, "budget.steps=7"), tmp_path / "run", Listener())
    resumed = train(run_of(crop, "budget.steps=10"), tmp_path / "run", Listener())
    assert resumed.samples == straight.samples == 40
    for stem in ("model", "ema-power", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert a == b, stem
    assert resumed.metrics["val/loss"] == straight.metrics["val/loss"]


def micro_batches(run, count):
    shards = DATA.build(run.data).open(Path(run.datasets), "train")
    batches = training_batches(run, shards, start=0, batch_size=run.train.batch_size // run.train.accumulation)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("crop", ["arb", "patch_diffusion"])
def test_every_sample_of_a_step_weighs_the_same(crop, tmp_path, monkeypatch):
    """The gradient of a step over micro-batches of two sizes is the mean of its samples' own gradients, however large they are."""
    run = run_of(crop, "train.batch_size=4", "train.clip=0", "routing=none", "budget.steps=1")
    seed = next(
        seed
        for seed in range(50)
        if len({tuple(b.pixels.shape) for b in micro_batches(run_of(crop, "train.batch_size=4", f"seed={seed}"), 2)}) == 2
    )
    run.seed = seed
    models, gradients = [], {}
    make, clipped = loop.build, loop.clipped_step

    def made(*args, **kwargs):
        models.append(make(*args, **kwargs))
        return models[-1]

    def step(optimizer, clip):
        gradients.update({name: p.grad.clone() for name, p in models[0].named_parameters()})
        return clipped(optimizer, clip)

    monkeypatch.setattr(loop, "build", made)
    monkeypatch.setattr(loop, "clipped_step", step)
    train(run, tmp_path / "run", Listener())
    model = build(Architecture.of(run), seed=run.seed)
    examples, objective = Examples(run, torch.device("cpu")), OBJECTIVE.build(run.objective)
    for batch in micro_batches(run, 2):
        x = examples.draw(batch, model)
        for i in range(len(batch)):
            rows = slice(i, i + 1)
            loss = objective.loss(
                model,
                x.latents[rows],
                noise=x.noise[rows],
                timestep=x.timestep[rows],
                condition=x.condition[rows],
                route=None,
            )
            (loss.sum() / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("crop", ["arb", "patch_diffusion"])
def test_the_clock_counts_the_flops_of_each_size(crop, tmp_path):
    run = run_of(crop, "budget.steps=6")
    result = train(run, tmp_path / "run", Listener())
    batches = micro_batches(run, 12)
    examples = Examples(run, torch.device("cpu"))
    expected = sum(
        3 * len(b) * count_flops(
            Architecture.of(run),
            grid=examples.grid(b.pixels),
            text_tokens=examples.text_encoder.encode(b.captions)[0].shape[1],
            rate=run.routing.rate,
        )
        for b in batches
    )  # fmt: skip
    assert len({tuple(b.pixels.shape[2:]) for b in batches}) > 1
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["flops"] == expected
    assert state["samples"] == sum(len(b) for b in batches)
