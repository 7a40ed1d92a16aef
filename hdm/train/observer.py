"""What happens between steps: numbers, validation, pictures and checkpoints, each at its own interval of samples seen."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hdm.config.schema import RunConfig
from hdm.data.loader import Batch
from hdm.train import snapshots
from hdm.train.checkpoint import Writer
from hdm.train.cost import Speedometer
from hdm.train.grid import SampleGrid
from hdm.train.meter import Meter
from hdm.train.parallel import World
from hdm.train.progress import ProgressLine
from hdm.train.recorder import Recorder
from hdm.train.stages import Stage
from hdm.train.state import TrainState
from hdm.train.validation import Validation

_SKIPPED_SHOWN = 5


Evaluate = Callable[[Path, RunConfig, int], object]  # given a checkpoint, the stage that it is of and the samples seen


@dataclass(kw_only=True, slots=True)
class TrainResult:
    """How training ended. `status` is finished or interrupted; `metrics` holds the last value of each name."""

    status: str
    samples: int
    metrics: dict[str, float]
    checkpoint: Path


class Observer:
    """Watches the state of one stage and writes down what it sees. Never changes what is trained.

    Every process has one, since what it asks for (a loss of sharded weights, a checkpoint) takes all of them; the recorder of all
    but the first one is silent.
    """

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        *,
        world: World,
        recorder: Recorder,
        state: TrainState,
        validation: Validation,
        grid: SampleGrid,
        writer: Writer,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.stage, self.run, self.folder, self.recorder, self.state = stage, stage.run, folder, recorder, state
        self.world, self.validation, self.grid, self.writer, self.evaluate = world, validation, grid, writer, evaluate
        self.meter = Meter(world)
        examples = validation.examples
        self.speed = Speedometer.of(self.run, examples.device, state.clock, devices=world.size, frozen=examples.frozen)
        label = f"{folder.name} {stage.name}".strip()
        console = None if world.main else Console(quiet=True)
        self.progress = ProgressLine(label, fraction=stage.fraction(state.clock), clock=state.clock, console=console)
        self._metrics: dict[str, float] = {}
        self._saved = ""
        self._rate = 0.0
        self._skipped: set[str] = set()
        self._validated, self._sampled = -1, -1

    def begin(self, start: Path | None) -> None:
        """Look at the initial weights, or say from which checkpoint the run goes on."""
        parameters = {"model/parameters": float(sum(p.numel() for p in self.state.model.parameters()))}
        self._metrics.update(parameters)
        if self.world.main:
            snapshots.drop_after(self.folder, self.state.clock.samples)
        if start is not None:
            self._saved = start.name
            self.recorder.rewind(self.state.clock.samples)
            self.progress.note(f"continues from {start}")
            return
        self.recorder.metrics(parameters, None)
        self._validate()
        self._sample()
        if self.grid.captions and self.world.main:
            self.recorder.artifact(self.grid.write_captions(self.folder))
        self._save()

    def skipped(self, batch: Batch) -> None:
        """Count records that could not be used; the first few get a line each."""
        for record in batch.skipped:
            self.state.skipped += 1
            if record.key not in self._skipped and len(self._skipped) < _SKIPPED_SHOWN:
                self._skipped.add(record.key)
                self.progress.note(f"skipped {record.key}: {record.reason}")

    def step(self, before: int, *, rate: float) -> None:
        """A step took the samples seen from `before` to the clock's, at `rate` times the base learning rate."""
        now, train = self.state.clock.samples, self.run.train
        self._rate = rate

        def passed(every: int | None) -> bool:
            return every is not None and now // every > before // every

        if passed(train.log_every):
            self._log()
        if passed(train.validate_every):
            self._validate()
        if passed(train.sample_every):
            self._sample()
        if passed(self.run.ema.snapshot_every or None):
            self._snapshot()
        if passed(train.checkpoint_every) or passed(train.milestone_every):
            self._save(milestone=passed(train.milestone_every))
        if self.evaluate is not None and self.run.eval.every and passed(self.run.eval.every):
            path = self._save()
            if self.world.main:
                self.writer.wait()
                self.evaluate(path, self.run, now)
        self.progress.step(self.state.clock, self.stage.fraction(self.state.clock))

    def finish(self) -> TrainResult:
        """Save the last step; a stage that is over is also validated and drawn, and its checkpoint kept for good."""
        over = self.stage.over(self.state.clock)
        self._log()
        if over:
            self._validate()
            self._sample()
        path = self._save()
        if self.world.main:
            self.writer.wait()
        self.world.gathered(None)  # the next stage begins with this checkpoint, in every process
        self.progress.line(self.state.clock, self.stage.fraction(self.state.clock))
        return TrainResult(
            status="finished" if over else "interrupted",
            samples=self.state.clock.samples,
            metrics=dict(self._metrics),
            checkpoint=path,
        )

    def _read(self) -> None:
        """Wait for the device and hear what it measured, on the clock of training."""
        began = time.perf_counter()
        self.meter.read(remedy=self._after_infinity)
        self.state.clock.spend(time.perf_counter() - began, devices=self.world.size)

    def _after_infinity(self) -> str:
        self.writer.wait()
        return (
            f"the last good checkpoint is {self.writer.newest}; lower optimizer.lr, lengthen schedule.warmup or set"
            " train.precision=fp32"
        )

    def _log(self) -> None:
        self._read()
        means = self.meter.summary()
        if means:
            rate = {"train/lr": self._rate * self.run.optimizer.lr, "data/skipped": float(self.state.skipped)}
            stage = {"train/stage": float(self.stage.number)} if self.stage.name else {}
            self._record(means | rate | stage | self.speed.read(self.state.clock))

    def _validate(self) -> None:
        if self._validated == self.state.clock.samples:
            return
        self._validated = self.state.clock.samples
        self._record(self.validation.measure(self.state.model, self.state.averages))

    def _sample(self) -> None:
        if self._sampled == self.state.clock.samples or not self.grid.captions:
            return
        self._sampled = self.state.clock.samples
        with self.state.averages.applied(self.state.model, self.state.averages.best):
            path = self.grid.draw(self.folder, self._sampled)
        self.recorder.image("samples/grid", path, self._sampled)

    def _save(self, *, milestone: bool = False) -> Path:
        self._read()  # never save behind a loss that nobody has looked at
        milestone = milestone or (self.stage.over(self.state.clock) and not self.stage.last)
        if self._saved != self.state.name:
            self.state.save(self.folder, self.run, writer=self.writer, stage=self.stage.number, milestone=milestone)
            self._saved = self.state.name
        return self.folder / "checkpoints" / self._saved

    def _snapshot(self) -> None:
        self._read()
        snapshots.write(self.folder, samples=self.state.clock.samples, averages=self.state.averages.snapshot(), world=self.world)

    def _record(self, values: Mapping[str, float]) -> None:
        self._metrics.update(values)
        self.recorder.metrics(values, self.state.clock.samples)
        self.progress.metrics(self.state.clock, self.stage.fraction(self.state.clock), values)
