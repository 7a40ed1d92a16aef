"""What to change when memory runs out: the one override that helps most, by what autograd would save."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hdm.config.errors import TrainingError
from hdm.config.schema import RunConfig
from hdm.model import Architecture
from hdm.model.memory import saved_bytes


@contextmanager
def explained(run: RunConfig, processes: int) -> Iterator[None]:
    """Turn an allocation that fails inside into a TrainingError that names the override that helps most."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
            raise
        reason = " ".join(text.split())[:160]
        raise TrainingError(f"memory ran out ({reason}); {_remedy(run, processes)}. The same command continues") from None


def _remedy(run: RunConfig, processes: int) -> str:
    """The change that saves most activations, with what it leaves of them."""
    now = _saved(run, processes)
    best = min(_changes(run, processes), key=lambda change: _saved(change[1], processes), default=None)
    if best is None:
        return "choose a smaller model= or crop.size"
    left = _saved(best[1], processes)
    return f"set {best[0]}: activations of {now / 1e9:.3g} GB become {left / 1e9:.3g} GB"


def _changes(run: RunConfig, processes: int) -> Iterator[tuple[str, RunConfig]]:
    if not run.model.gradient_checkpointing:
        model = dataclasses.replace(run.model, gradient_checkpointing=True)
        yield "model.gradient_checkpointing=true", dataclasses.replace(run, model=model)
    size, parts = run.train.batch_size, run.train.accumulation
    divisors = [n for n in range(2 * parts, size + 1) if size % n == 0 and size // n % processes == 0]
    if divisors:
        train = dataclasses.replace(run.train, accumulation=divisors[0])
        yield f"train.accumulation={divisors[0]}", dataclasses.replace(run, train=train)


def _saved(run: RunConfig, processes: int) -> int:
    side = run.crop.size // (run.autoencoder.factor * run.model.patch)
    batch = max(run.train.batch_size // (run.train.accumulation * processes), 1)
    rate = getattr(run.routing, "rate", 0.0)
    return saved_bytes(Architecture.of(run), batch=batch, grid=(side, side), text_tokens=run.text_encoder.max_length, rate=rate)
