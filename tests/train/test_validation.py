from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm

from hdm import rng
from hdm.config.axes import DATA, OBJECTIVE
from hdm.diffusion import batching
from hdm.model import Architecture, build
from hdm.model.backbone import Condition
from hdm.train.ema import Averages
from hdm.train.examples import Examples
from hdm.train.parallel import World
from hdm.train.validation import Validation


def measure(run, *, seed=0, **kwargs):
    model = build(Architecture.of(run), seed=seed)
    shards = DATA.build(run.data).open(Path(run.datasets), "val")
    validation = Validation(run, shards, Examples(run, torch.device("cpu")), OBJECTIVE.build(run.objective))
    return model, validation, validation.measure(model, Averages(model, run.ema))


def test_the_loss_of_one_image_by_hand(nano):
    """float64 arithmetic around the network: t at the quantile midpoints, noise from its own key, velocity eps - x."""
    run = nano("validation.samples=3")
    model, validation, _ = measure(run)
    losses = validation.losses(model)
    assert losses.shape == (3, 4)
    examples, images = validation.examples, validation._images[0]
    assert images.index == [0, 1, 2]
    for k in range(4):
        t = expit(norm.ppf((k + 0.5) / 4))
        noise = rng.normal(0, f"validation/noise/{k}", [1], images.latents.shape[1:])[0].astype(np.float64)
        x = images.latents[1].double().numpy()
        x_t = torch.from_numpy((1 - t) * x + t * noise)[None].float()
        with torch.no_grad():
            v = model(x_t, torch.tensor([t]).float(), images.condition[1:2])
        assert losses[1, k].item() == pytest.approx(np.mean((v.double().numpy() - (noise - x)) ** 2), rel=1e-4)
    assert examples.device.type == "cpu"


def test_all_runs_are_asked_the_same(nano):
    """The same weights have the same loss, whatever the run's seed, batch size, routing, law of the timestep and training loss."""
    _, _, metrics = measure(nano())
    same = "seed=5", "routing=none", "train.batch_size=8", "timestep=uniform", "timestep.mean=1", "objective=cosine"
    for override in (*same, "objective=contrastive"):
        assert measure(nano(override))[2] == metrics, override


def test_batch_size_changes_no_bit(nano, monkeypatch):
    tokens = (nano().crop.size // (nano().autoencoder.factor * nano().model.patch)) ** 2
    monkeypatch.setattr(batching, "CPU_TOKENS", 3 * tokens)
    found = {}
    for size in (1, 4, 64):
        run = nano("validation.whole=true", "validation.samples=8", f"validation.batch_size={size}")
        _, validation, metrics = measure(run)
        found[size] = metrics, [[len(some.index) for some in kept] for kept in (validation._images, validation._whole)]
    assert found[64][1][0] == [3, 3, 2]
    assert found[1] == found[4] == found[64]


@pytest.mark.parametrize("whole", [False, True])
def test_processes_pass_equally_often(nano, whole, monkeypatch):
    """A forward pass of FSDP2 waits for all: of 8 images, in passes of 3 and batches of 6, none has one more than the others."""
    tokens = (nano().crop.size // (nano().autoencoder.factor * nano().model.patch)) ** 2
    monkeypatch.setattr(batching, "CPU_TOKENS", 3 * tokens)
    run = nano("validation.whole=true", "validation.samples=8", "validation.batch_size=6")
    model = build(Architecture.of(run), seed=0)
    shards, examples = DATA.build(run.data).open(Path(run.datasets), "val"), Examples(run, torch.device("cpu"))

    def seen(world):
        validation = Validation(run, shards, examples, OBJECTIVE.build(run.objective), world=world)
        return [images.index for images in validation._encoded(model, whole)]

    parts, alone = [seen(World(rank=rank, size=2)) for rank in (0, 1)], seen(World())
    assert len(parts[0]) == len(parts[1])
    assert {tuple(index) for part in parts for index in part} == {tuple(index) for index in alone}


def test_bins_are_quarters_of_the_law_and_average_to_the_whole(nano):
    _, _, metrics = measure(nano("validation.timesteps=8"))
    bins = [metrics[f"val/loss_t{i}"] for i in range(4)]
    assert np.mean(bins) == pytest.approx(metrics["val/loss"], rel=1e-6)
    _, _, few = measure(nano("validation.timesteps=2"))
    assert {key for key in few if "_t" in key} == {"val/loss_t0", "val/loss_t2"}


def test_averaged_raw_and_unconditional_are_three_numbers(nano):
    run = nano()
    model, validation, _ = measure(run)
    averages = Averages(model, run.ema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    metrics = validation.measure(model, averages)
    assert metrics["val/loss"] != metrics["val/loss_raw"]
    assert metrics["val/loss_raw"] == pytest.approx(validation.losses(model).mean().item())
    assert metrics["val/loss_unconditional"] != metrics["val/loss"]
    with averages.applied(model, "power"):
        assert metrics["val/loss_unconditional"] == pytest.approx(validation.losses(model, unconditional=True).mean().item())


def test_the_unconditional_loss_sees_no_caption(nano):
    _, validation, _ = measure(nano())
    images = validation._images[0]
    states, mask = validation.examples.text_encoder.encode([""])
    assert isinstance(images.unconditional, Condition)
    assert torch.equal(images.unconditional.text[0], states[0])
    assert torch.equal(images.unconditional.text_mask[0], mask[0])
    assert torch.equal(images.unconditional.position, images.condition.position)
