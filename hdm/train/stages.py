"""Where the stages of a run begin and end, on the clock of samples seen. A run without stages is one stage, and its budget ends it.

Needs no torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hdm.config.compose import stage_run
from hdm.config.schema import BudgetConfig, Moments, RunConfig, StageConfig
from hdm.train.budget import Clock, limits, used


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage: `run` is the run that it is by itself; it lasts from sample `start` to `end`, None: until the budget is used.

    `total` are the samples of all stages, `budget` ends the whole run if it is used before.
    """

    number: int
    name: str
    run: RunConfig
    start: int
    first_step: int
    end: int | None
    total: int | None
    budget: BudgetConfig
    moments: Moments

    def progress(self, clock: Clock) -> float:
        """The fraction of the stage that is done; by it the learning rate is scheduled."""
        if self.end is None:
            return used(self.budget, clock)
        return (clock.samples - self.start) / (self.end - self.start)

    def fraction(self, clock: Clock) -> float:
        """The fraction of the whole run that is done."""
        if self.total is None:
            return used(self.budget, clock)
        return max(clock.samples / self.total, self._spent(clock))

    def over(self, clock: Clock) -> bool:
        """Whether the stage, or the whole run, ends here."""
        return self.progress(clock) >= 1 or self._spent(clock) >= 1

    def _spent(self, clock: Clock) -> float:
        return used(self.budget, clock) if limits(self.budget, may_be_none=True) else 0.0

    @property
    def last(self) -> bool:
        """Whether no stage follows."""
        return self.end == self.total


def stages(run: RunConfig, images: Callable[[RunConfig], int]) -> list[Stage]:
    """The stages of `run` in order; `images` counts the training images of a stage whose configuration does not."""
    if not run.stages:
        limits(run.budget)
        single = Stage(
            number=0, name="", run=run, start=0, first_step=0, end=None, total=None, budget=run.budget, moments=Moments.keep
        )
        return [single]
    runs = [stage_run(run, stage) for stage in run.stages]
    counts = [steps(stage, own, images) for stage, own in zip(run.stages, runs)]
    sizes = [count * own.train.batch_size for count, own in zip(counts, runs)]
    return [
        Stage(
            number=number,
            name=stage.name,
            run=runs[number],
            start=sum(sizes[:number]),
            first_step=sum(counts[:number]),
            end=sum(sizes[: number + 1]),
            total=sum(sizes),
            budget=run.budget,
            moments=stage.moments,
        )
        for number, stage in enumerate(run.stages)
    ]


def steps(stage: StageConfig, run: RunConfig, images: Callable[[RunConfig], int]) -> int:
    """Optimizer steps of a stage: what it says, or whole batches of its epochs; at least one."""
    if stage.steps is not None:
        return stage.steps
    epoch = stage.images if stage.images is not None else images(run)
    return max(math.floor(epoch // run.train.batch_size * (stage.epochs or 1.0)), 1)
