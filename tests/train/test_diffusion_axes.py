"""Objectives, timestep laws, samplers and guidance inside a run."""

import math
from pathlib import Path

import pytest
import torch

from hdm.config.axes import DATA
from hdm.data.loader import training_batches
from hdm.model import Architecture, build
from hdm.train.examples import Examples
from hdm.train.loop import train


@pytest.mark.parametrize(
    "words",
    [
        ["objective=x_prediction", "timestep=shifted", "sampler=heun", "guidance=interval"],
        ["objective=cosine", "timestep=cosmap", "sampler=dpmpp_2m", "guidance=cfg_zero_star"],
        ["objective=contrastive", "timestep=mode", "sampler=euler_maruyama", "guidance=routed"],
        ["objective=x_prediction", "objective.space=x", "timestep=edm", "train.precision=bf16"],
    ],
    ids=lambda words: words[0] + "-" + words[1],
)
def test_a_run_trains_validates_and_draws(nano, listener, tmp_path, words):
    small = ["budget.steps=12", "train.batch_size=8", "optimizer.lr=0.02", "sampling.grid=2", "sampler.steps=3"]
    result = train(nano(*words, *small), tmp_path / "run", listener)
    loss = listener.series("val/loss")
    assert result.status == "finished"
    assert all(map(math.isfinite, loss.values()))
    assert loss[96] < loss[0]
    assert len(listener.images) == 2


def test_the_shifted_law_follows_the_tokens_of_the_batch(nano):
    """Same uniform draws, so t' = a t / (1 + (a - 1) t) sample by sample, a the square root of the tokens at base_tokens=1."""
    run, plain = nano("timestep=shifted", "timestep.law=uniform", "timestep.base_tokens=1"), nano("timestep=uniform")
    shards = DATA.build(run.data).open(Path(run.datasets), "train")
    batch = next(training_batches(run, shards, start=0, batch_size=4))
    model = build(Architecture.of(run), seed=0)
    shifted, t = (Examples(r, torch.device("cpu")).draw(batch, model).timestep for r in (run, plain))
    rows, columns = Examples(run, torch.device("cpu")).grid(batch.pixels)
    assert rows * columns == 16
    torch.testing.assert_close(shifted, 4 * t / (1 + 3 * t))


def test_stratified_timesteps_reach_every_part_of_the_law_in_a_step(nano):
    """Two micro-batches of one step: eight samples in the eight parts of the uniform law."""
    run = nano("timestep=uniform", "timestep.stratified=true", "train.batch_size=8", "train.accumulation=2")
    shards = DATA.build(run.data).open(Path(run.datasets), "train")
    batches = training_batches(run, shards, start=8, batch_size=4)
    model, examples = build(Architecture.of(run), seed=0), Examples(run, torch.device("cpu"))
    t = torch.cat([examples.draw(next(batches), model).timestep for _ in range(2)])
    assert sorted((8 * t).int().tolist()) == list(range(8))


def test_a_run_draws_its_grid_with_another_run_as_guide(nano, listener, tmp_path):
    small = ["budget.steps=2", "train.batch_size=8", "sampling.grid=2", "sampler.steps=3"]
    train(nano(*small), tmp_path / "weak", listener)
    guided = nano(*small, "guidance=autoguidance", f"guidance.ckpt={tmp_path / 'weak'}", "name=strong")
    before = len(listener.images)
    assert train(guided, tmp_path / "strong", listener).status == "finished"
    assert len(listener.images) > before
