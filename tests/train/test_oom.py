"""Memory that runs out: the override that is named is the one that leaves least to keep, by the estimate of the plan."""

import dataclasses

import pytest
import torch
from squares import NANO

from hdm.config.compose import compose
from hdm.config.errors import TrainingError
from hdm.model import Architecture
from hdm.model.memory import saved_bytes
from hdm.train.oom import explained

BIG = [*NANO, "train.batch_size=64", "train.accumulation=2"]


def words(run, error, processes=1):
    with pytest.raises(TrainingError) as caught, explained(run, processes):
        raise error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(run, accumulation):
    rate, text = run.routing.rate, run.text_encoder.max_length
    return saved_bytes(Architecture.of(run), batch=64 // accumulation, grid=(4, 4), text_tokens=text, rate=rate)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_the_change_that_helps_most_is_named(error):
    run = compose(BIG)
    cheaper = dataclasses.replace(run, model=dataclasses.replace(run.model, gradient_checkpointing=True))
    best = min(
        [("model.gradient_checkpointing=true", kept(cheaper, 2)), ("train.accumulation=4", kept(run, 4))], key=lambda c: c[1]
    )
    said = words(run, error)
    assert f"set {best[0]}: activations of {kept(run, 2) / 1e9:.3g} GB become {best[1] / 1e9:.3g} GB" in said


def test_with_checkpointing_on_it_is_the_next_accumulation_that_the_processes_divide():
    run = compose([*BIG, "model.gradient_checkpointing=true", "train.batch_size=24", "train.accumulation=3"])
    assert "set train.accumulation=6:" in words(run, MemoryError(), processes=2)
    assert "set train.accumulation=8:" in words(run, MemoryError(), processes=3)  # 24 / 6 = 4 images are no three parts


def test_where_nothing_is_left_to_change():
    run = compose([*NANO, "model.gradient_checkpointing=true", "train.batch_size=4", "train.accumulation=4"])
    assert "choose a smaller model= or crop.size" in words(run, MemoryError())


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained(compose(NANO), 1):
        raise RuntimeError("shapes do not fit")
