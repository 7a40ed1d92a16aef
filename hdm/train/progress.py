"""What a person sees while a run trains: a live bar on a terminal, a plain line every few seconds in a log file."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from hdm.train.budget import Clock

_EVERY = 10.0  # seconds between two plain lines


class ProgressLine:
    """The progress of one run. `fraction` below is the used fraction of its budget."""

    def __init__(self, label: str, *, fraction: float, clock: Clock, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.label = label
        self._start = (fraction, clock.seconds)
        self._metrics: dict[str, float] = {}
        self._printed, self._last = -_EVERY, ""
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=16),
                TaskProgressColumn(),
                TextColumn("{task.fields[words]}", table_column=Column(ratio=1)),  # wraps where a terminal is narrow
                console=self.console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task(label, total=1.0, words="")

    def __enter__(self) -> "ProgressLine":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, clock: Clock, fraction: float) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(fraction, 1.0), words=self.words(clock, fraction))

    def metrics(self, clock: Clock, fraction: float, metrics: Mapping[str, float]) -> None:
        """New numbers are known."""
        self._metrics.update(metrics)
        self.step(clock, fraction)
        if self._bar is None and time.monotonic() - self._printed >= _EVERY:
            self.line(clock, fraction)

    def line(self, clock: Clock, fraction: float) -> None:
        """Print where the run is, unless that was the last line already."""
        self._printed = time.monotonic()
        text = f"{self.label} {fraction:4.0%}  {self.words(clock, fraction)}"
        if text != self._last:
            self.note(text)
        self._last = text

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self.console.print(text, markup=False, highlight=False)

    def words(self, clock: Clock, fraction: float) -> str:
        """Step, samples, loss, speed, utilisation, time to go and money, as far as they are known."""
        known = self._metrics
        parts = [f"step {clock.steps:,}", f"samples {clock.samples:,}"]
        if "train/loss" in known:
            parts.append(f"loss {known['train/loss']:.4f}")
        if "val/loss" in known:
            parts.append(f"val {known['val/loss']:.4f}")
        if "speed/images_per_second" in known:
            parts += [f"{known['speed/images_per_second']:.4g} images/s", f"MFU {known['speed/mfu']:.1%}"]
        if (left := self._seconds_left(clock, fraction)) is not None:
            parts.append(f"ETA {_duration(left)}")
        if "cost/gpu_hours" in known:
            parts.append(f"{known['cost/gpu_hours']:.3g} device h")
        if "cost/dollars" in known:
            parts.append(f"${known['cost/dollars']:.2f}")
        return "  ".join(parts)

    def _seconds_left(self, clock: Clock, fraction: float) -> float | None:
        """Training time to go, at the speed since this process began."""
        done, seconds = fraction - self._start[0], clock.seconds - self._start[1]
        return max(1 - fraction, 0.0) * seconds / done if done > 0 else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
