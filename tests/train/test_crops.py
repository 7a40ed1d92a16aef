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

from hdm import rng
from hdm.config.axes import AXES, CROP, DATA, OBJECTIVE, discover
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.data.loader import training_batches, validation_batches, whole_batches
from hdm.model import Architecture, build
from hdm.model.backbone import Condition
from hdm.model.flops import count_flops
from hdm.train import loop
from hdm.train.examples import Examples
from hdm.train.loop import train
from hdm.train.validation import Validation

SHAPES = [(40, 20), (20, 40), (30, 30), (36, 24)]
COMMON = [*NANO, "train.accumulation=2", "schedule=constant", "validation.samples=3", "optimizer.lr=0.05"]
discover()
CROPS = [*CROP.names(), "arb crop.law=nai", "arb crop.law=pixart crop.step=4 crop.balanced=7", "center crop.hflip=0.5"]


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


def test_whole_images_are_asked_of_every_crop(tmp_path):
    """Before training all arms have the same weights, so both validation losses must agree whatever the crop."""
    losses = []
    for crop in ("shifted_square", "arb", "patch_diffusion", "arb crop.law=nai"):
        listener = Listener()
        train(run_of(crop, "budget.steps=1", "validation.whole=true"), tmp_path / crop.replace(" ", ""), listener)
        losses.append([listener.series(name)[0] for name in ("val/loss", "val/loss_whole")])
    assert losses == [losses[0]] * 4
    assert losses[0][0] != losses[0][1]


def test_whole_images_are_measured_as_by_hand(tmp_path):
    """One image at a time, its box by HDM's law: the mean over images, not over batches or pixels."""
    run = run_of("shifted_square", "validation.whole=true", "validation.samples=5")
    held_out = DATA.build(run.data).open(Path(run.datasets), "val")
    model, examples = build(Architecture.of(run), seed=0), Examples(run, torch.device("cpu"))
    validation = Validation(run, held_out, examples, OBJECTIVE.build(run.objective))
    batches = list(whole_batches(run, held_out, samples=5, batch_size=64))
    squares = next(validation_batches(run, held_out, samples=5, batch_size=64))
    assert sorted(zip((i for b in batches for i in b.index), (k for b in batches for k in b.keys))) == list(
        zip(squares.index, squares.keys)
    )
    own = {tuple(b.pixels.shape[2:]): len(b) for b in batches}  # 40 x 20, 20 x 40, 30 x 30 twice (or once), 36 x 24
    assert set(own) == {(8, 20), (20, 8), (16, 16), (12, 16)}
    losses = []
    for batch in batches:
        for i, number in enumerate(batch.index):
            one = Condition(
                text=examples.condition(batch, batch.captions, model).text[i : i + 1],
                text_mask=examples.condition(batch, batch.captions, model).text_mask[i : i + 1],
                position=model.position_map(batch.view[i : i + 1], examples.grid(batch.pixels)),
                aspect=batch.aspect[i : i + 1],
            )
            for k, t in enumerate(validation.timesteps):
                noise = torch.from_numpy(rng.normal(0, f"validation/noise/{k}", [number], batch.pixels.shape[1:]))
                x = batch.pixels[i : i + 1]
                with torch.no_grad():
                    v = model.eval()((1 - t) * x + t * noise, t[None].float(), one)
                losses.append((v - (noise - x)).square().mean().item())
    assert validation.losses(model, whole=True).mean().item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_needs_squares_refuses_whole_images(monkeypatch):
    monkeypatch.setattr(AXES["norm"].get("layer").config, "needs", {"square": "a reason"}, raising=False)
    with pytest.raises(ConfigError, match=r"validation.whole=true: .*norm=layer needs square batches \(a reason\)"):
        run_of("shifted_square", "validation.whole=true", "norm=layer")


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
