"""Arms of equal seed are paired, whatever they differ in: every variant of every axis starts from the values that it shares with
the default, and sees the same records, captions, crops, timesteps and noise. A plugin's variants take part with
`-p my_lab.merges`."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nano import MODEL_AXES, architecture
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
from tiny_run import TINY, write_shards

from hdm.config.axes import DATA, discover
from hdm.config.compose import compose
from hdm.data.crop import ArbConfig
from hdm.data.loader import training_batches
from hdm.model import Architecture, build
from hdm.model.init import _default, initialize, stated
from hdm.rng import generator
from hdm.train.examples import Examples

SEED = 3
# What these axes choose is what the examples are made of; records, captions and crops are the same all the same.
OTHER_STATES = ("text_encoder", "autoencoder")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(run, shards, its batch, its examples, its network) of the defaults."""
    folder = write_shards(tmp_path_factory.mktemp("pairing"))
    run = compose([*TINY, f"seed={SEED}", f"data.path={folder}"])
    shards = DATA.build(run.data).open(Path(run.datasets), "train")
    model = build(Architecture.of(run), seed=SEED)
    batch = draw_batch(run, shards)
    return run, shards, batch, Examples(run, torch.device("cpu")).draw(batch, model), model


def draw_batch(run, shards):
    return next(training_batches(run, shards, start=8, batch_size=4))


def laws(model):
    """What the law of each parameter makes of one and the same generator: equal for equal laws."""
    special = stated(model, "initial")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {
        name: (special.get(name) or _default(model, name))(generator(0, "probe", name), shape) for name, shape in shapes.items()
    }


def moved(first, second):
    """The parameters of one name, shape and law whose values differ, and the number of those that there are.

    A law that a variant states of its own, such as zero where no gate stands behind a layer, is part of what is compared.
    """
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    one, other = laws(first), laws(second)
    shared = [name for name in shared if np.array_equal(one[name], other[name])]
    return [name for name in shared if not torch.equal(ours[name], theirs[name])], len(shared)


@pytest.fixture(scope="module")
def default():
    return build(architecture(), seed=SEED)


@pytest.mark.parametrize("axis", MODEL_AXES)
def test_shared_parameters_start_from_equal_values(axis, default):
    for variant in discover()[axis].variants.values():
        differ, shared = moved(default, build(architecture(**{axis: variant.name}), seed=SEED))
        assert not differ, f"{axis}={variant.name}: {differ[:5]}"
        assert shared, f"{axis}={variant.name}: shares no parameter with the default"


@pytest.mark.parametrize("axis", [axis for axis in discover() if axis != "data"])
def test_records_captions_crops_timesteps_and_noise_are_those_of_the_seed(axis, reference):
    run, shards, batch, examples, model = reference
    for variant in discover()[axis].variants.values():
        arm = dataclasses.replace(run, **{axis: variant.config()})
        if axis == "crop":
            arm.crop.size = run.crop.size
        seen = draw_batch(arm, shards)
        assert seen.index == batch.index, variant.name
        if not issubclass(variant.config, ArbConfig):  # a batch has one size: records of one shape come together
            assert (seen.keys, seen.captions) == (batch.keys, batch.captions), variant.name
        if axis != "crop":
            assert torch.equal(seen.pixels, batch.pixels) and torch.equal(seen.view, batch.view), variant.name
        if axis in OTHER_STATES:
            continue
        ours = Examples(arm, torch.device("cpu")).draw(seen, model)
        if axis != "timestep":
            assert torch.equal(ours.timestep, examples.timestep), variant.name
        if ours.noise.shape == examples.noise.shape:
            assert torch.equal(ours.noise, examples.noise) and torch.equal(ours.route.noise, examples.route.noise), variant.name


def test_another_seed_moves_all_of_it(reference):
    """What is compared above is not constant."""
    run, shards, batch, examples, model = reference
    other = dataclasses.replace(run, seed=SEED + 1)
    seen = draw_batch(other, shards)
    drawn = Examples(other, torch.device("cpu")).draw(batch, model)
    assert seen.keys != batch.keys
    assert not torch.equal(drawn.noise, examples.noise) and not torch.equal(drawn.timestep, examples.timestep)
    differ, shared = moved(model, build(Architecture.of(run), seed=SEED + 1))
    assert len(differ) > shared / 2


def test_a_module_more_moves_nothing_else(reference):
    model = reference[-1]
    more = build(Architecture.of(reference[0]), seed=None).to_empty(device="cpu")
    more.add_module("another", nn.Linear(5, 7))
    initialize(more, SEED)
    assert moved(model, more) == ([], len(list(model.parameters())))
