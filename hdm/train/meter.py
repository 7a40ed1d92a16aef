"""Losses and gradient norms. They stay on the device until they are read, since reading one makes the host wait for the device."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdm.config.errors import TrainingError
from hdm.data.loader import Batch

_NAMED = 8  # keys that an error names


@dataclass(slots=True)
class _Step:
    number: int
    keys: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    alignment: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None


class Meter:
    """Collects one training run's losses and gradient norms."""

    def __init__(self) -> None:
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

    def read(self, *, remedy: str) -> None:
        """Fetch what is pending: here the host waits. Raises TrainingError, ending in `remedy`, if anything is not finite."""
        if not self._pending:
            return
        sizes = [len(step.index) for step in self._pending]
        losses = torch.split(torch.cat([loss for step in self._pending for loss in step.losses]).cpu(), sizes)
        aligned = [torch.cat(step.alignment).mean() for step in self._pending if step.alignment]
        norms = torch.stack([step.norm for step in self._pending if step.norm is not None]).tolist()
        for step, values, norm in zip(self._pending, losses, norms, strict=True):
            if not (math.isfinite(norm) and values.isfinite().all()):
                raise TrainingError(f"{_describe(step, values, norm)}; {remedy}")
            self._losses.append(values.double().mean().item())
            self._norms.append(norm)
        self._alignment += torch.stack(aligned).tolist() if aligned else []
        self._pending.clear()

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


def _describe(step: _Step, losses: Tensor, norm: float) -> str:
    bad = [key for key, finite in zip(step.keys, losses.isfinite().tolist(), strict=True) if not finite]
    what = f"loss is {losses.mean().item()}" if bad else f"gradient norm is {norm} with a finite loss"
    named = bad or step.keys
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"step {step.number}: {what}; samples {step.index[0]}-{step.index[-1]}, keys {', '.join(named[:_NAMED])}{more}"
