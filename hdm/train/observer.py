"""What happens between steps: numbers, validation, pictures and checkpoints, each at its own interval of samples seen."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hdm.config.schema import RunConfig
from hdm.data.loader import Batch
from hdm.train.budget import used
from hdm.train.cost import Speedometer
from hdm.train.grid import SampleGrid
from hdm.train.meter import Meter
from hdm.train.progress import ProgressLine
from hdm.train.recorder import Recorder
from hdm.train.state import TrainState
from hdm.train.validation import Validation

_SKIPPED_SHOWN = 5


@dataclass(kw_only=True, slots=True)
class TrainResult:
    """How training ended. `status` is finished or interrupted; `metrics` holds the last value of each name."""

    status: str
    samples: int
    metrics: dict[str, float]
    checkpoint: Path


class Observer:
    """Watches the state of one run and writes down what it sees. Never changes what is trained."""

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        *,
        recorder: Recorder,
        state: TrainState,
        validation: Validation,
        grid: SampleGrid,
        start: Path | None,
    ) -> None:
        self.run, self.folder, self.recorder, self.state = run, folder, recorder, state
        self.validation, self.grid = validation, grid
        self.meter = Meter()
        self.speed = Speedometer.of(run, validation.examples.device, state.clock)
        self.progress = ProgressLine(folder.name, fraction=used(run.budget, state.clock), clock=state.clock)
        self._metrics: dict[str, float] = {}
        self._checkpoint = start
        self._rate = 0.0
        self._skipped: set[str] = set()
        self._validated, self._sampled = -1, -1

    def begin(self) -> None:
        """Look at the initial weights, or say from where the run goes on."""
        parameters = {"model/parameters": float(sum(p.numel() for p in self.state.model.parameters()))}
        self._metrics.update(parameters)
        if self._checkpoint is not None:
            self.recorder.rewind(self.state.clock.samples)
            self.progress.note(f"continues from {self._checkpoint}")
            return
        self.recorder.metrics(parameters, None)
        self._validate()
        self._sample()
        if self.grid.captions:
            self.recorder.artifact(self.grid.write_captions(self.folder))
        self._save()

    def skipped(self, batch: Batch) -> None:
        """Count records that could not be used; the first few get a line each."""
        for record in batch.skipped:
            self.state.skipped += 1
            if record.key not in self._skipped and len(self._skipped) < _SKIPPED_SHOWN:
                self._skipped.add(record.key)
                self.progress.note(f"skipped {record.key}: {record.reason}")

    def step(self, before: int, *, rate: float, seconds: float) -> None:
        """A step took the samples seen from `before` to the clock's, at `rate` times the base learning rate, in `seconds`."""
        now, train = self.state.clock.samples, self.run.train
        self.state.clock.seconds += seconds
        self._rate = rate
        if now // train.log_every > before // train.log_every:
            self._log()
        if now // train.validate_every > before // train.validate_every:
            self._validate()
        if now // train.sample_every > before // train.sample_every:
            self._sample()
        if now // train.checkpoint_every > before // train.checkpoint_every:
            self._save()
        self.progress.step(self.state.clock, used(self.run.budget, self.state.clock))

    def finish(self) -> TrainResult:
        """Save the last step; a run that has used its budget is also validated and drawn."""
        finished = used(self.run.budget, self.state.clock) >= 1
        self._log()
        if finished:
            self._validate()
            self._sample()
        samples = self.state.clock.samples
        path = self._save()
        self.progress.line(self.state.clock, used(self.run.budget, self.state.clock))
        return TrainResult(
            status="finished" if finished else "interrupted", samples=samples, metrics=dict(self._metrics), checkpoint=path
        )

    def _read(self) -> None:
        """Wait for the device and hear what it measured, on the clock of training."""
        began = time.perf_counter()
        last = f"the last good checkpoint is {self._checkpoint}"
        self.meter.read(remedy=f"{last}; lower optimizer.lr, lengthen schedule.warmup or set train.precision=fp32")
        self.state.clock.seconds += time.perf_counter() - began

    def _log(self) -> None:
        self._read()
        means = self.meter.summary()
        if means:
            rate = {"train/lr": self._rate * self.run.optimizer.lr, "data/skipped": float(self.state.skipped)}
            self._record(means | rate | self.speed.read(self.state.clock))

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

    def _save(self) -> Path:
        self._read()  # never save behind a loss that nobody has looked at
        if self._checkpoint is None or self._checkpoint.name != self.state.name:
            self._checkpoint = self.state.save(self.folder, self.run)
        return self._checkpoint

    def _record(self, values: Mapping[str, float]) -> None:
        self._metrics.update(values)
        self.recorder.metrics(values, self.state.clock.samples)
        self.progress.metrics(self.state.clock, used(self.run.budget, self.state.clock), values)
