"""Losses and gradient norms. They stay on the device until they are read, since reading one makes the host wait for the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdm.config.errors import TrainingError
from hdm.data.loader import Batch
from hdm.train.parallel import World

_NAMED = 8  # keys that an error names


@dataclass(slots=True)
class _Step:
    number: int
    keys: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    alignment: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None


@dataclass(slots=True)
class _Read:
    """What one process measured in one step, on the host."""

    number: int
    keys: list[str]
    index: list[int]
    losses: list[float]
    alignment: float | None
    norm: float


class Meter:
    """Collects the losses and gradient norms of one training run, in all its processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: list[_Step] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._alignment: list[float] = []

    def begin(self, step: int) -> None:
        """Open the record of `step`."""
        self._pending.append(_Step(step))

    def losses(self, batch: Batch, losses: Tensor, *, alignment: Tensor | None = None) -> None:
        """Take in the per-sample losses of one micro-batch: the objective's, and the unweighted alignment where there is one."""
        step = self._pending[-1]
        step.keys += batch.keys
        step.index += batch.index
        step.losses.append(losses.detach())
        if alignment is not None:
            step.alignment.append(alignment.detach())

    def norm(self, norm: Tensor) -> None:
        """Take in the step's gradient norm; the step is complete."""
        self._pending[-1].norm = norm

    def read(self, *, remedy: Callable[[], str]) -> None:
        """Fetch what is pending: here the host waits, and every process asks. Raises TrainingError, ending in `remedy`, if anything
        is not finite."""
        mine, self._pending = _fetched(self._pending), []
        for parts in zip(*self.world.gathered(mine), strict=True):
            step = _joined(parts)
            if not (math.isfinite(step.norm) and all(map(math.isfinite, step.losses))):
                raise TrainingError(f"{_describe(step)}; {remedy()}")
            self._losses.append(sum(step.losses) / len(step.losses))
            self._norms.append(step.norm)
            if step.alignment is not None:
                self._alignment.append(step.alignment)

    def summary(self) -> dict[str, float]:
        """Means over the steps read since the last summary."""
        if not self._losses:
            return {}
        means = {
            "train/loss": sum(self._losses) / len(self._losses),
            "train/grad_norm": sum(self._norms) / len(self._norms),
        }
        if self._alignment:
            means["train/alignment"] = sum(self._alignment) / len(self._alignment)
        self._alignment.clear()
        self._losses.clear()
        self._norms.clear()
        return means


def _fetched(pending: list[_Step]) -> list[_Read]:
    """The steps' numbers, copied from the device at once."""
    if not pending:
        return []
    losses = iter(torch.cat([loss for step in pending for loss in step.losses]).tolist())
    norms = torch.stack([step.norm for step in pending if step.norm is not None]).tolist()
    aligned = [torch.cat(step.alignment).mean() for step in pending if step.alignment]
    means = iter(torch.stack(aligned).tolist() if aligned else [])
    return [
        _Read(step.number, step.keys, step.index, [next(losses) for _ in step.index], next(means) if step.alignment else None, norm)
        for step, norm in zip(pending, norms, strict=True)
    ]


def _joined(parts: tuple[_Read, ...]) -> _Read:
    """One step of all processes, its samples in their order: whoever has which, the sums are the same."""
    rows = sorted((i, key, loss) for part in parts for i, key, loss in zip(part.index, part.keys, part.losses, strict=True))
    index, keys, losses = (list(column) for column in zip(*rows, strict=True))
    aligned = [part.alignment for part in parts if part.alignment is not None]
    return _Read(parts[0].number, keys, index, losses, sum(aligned) / len(aligned) if aligned else None, parts[0].norm)


def _describe(step: _Read) -> str:
    bad = [key for key, loss in zip(step.keys, step.losses, strict=True) if not math.isfinite(loss)]
    mean = sum(step.losses) / len(step.losses)
    what = f"loss is {mean}" if bad else f"gradient norm is {step.norm} with a finite loss"
    named = bad or step.keys
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"step {step.number}: {what}; samples {step.index[0]}-{step.index[-1]}, keys {', '.join(named[:_NAMED])}{more}"
