"""One line per arm while a sweep runs: live on a terminal, at every change and now and then in a log file."""

import time
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hdm.launch.arm import Arm
from hdm.track.events import numbers, tail

_SHOWN = {"train/loss": "loss", "val/loss": "val", "speed/images_per_second": "images/s"}
_EVERY = 30.0  # seconds between two looks at a running arm where nothing is live


class SweepProgress:
    """What the arms are doing, read from their logs. Used as a context."""

    def __init__(self, arms: Sequence[Arm], *, console: Console) -> None:
        self._arms, self._console = arms, console  # a search adds arms on the way
        self._status: dict[str, str] = defaultdict(lambda: "waiting")
        self._offsets: dict[str, int] = defaultdict(int)
        self._samples: dict[str, int] = defaultdict(int)
        self._metrics: dict[str, dict[str, float]] = defaultdict(dict)
        self._printed = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> "SweepProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def set(self, arm: Arm, status: str) -> None:
        """`arm` is now waiting, running, finished, interrupted or failed."""
        self._status[arm.label] = status
        if self._live is None and status != "waiting":
            self._read(arm)
            self._console.print(self._line(arm), soft_wrap=True)
        self.update(force=self._live is not None)

    def update(self, force: bool = False) -> None:
        """Read the logs of the running arms and show what is new."""
        if self._live is None and time.monotonic() - self._printed < _EVERY:
            return
        self._printed = time.monotonic()
        running = [arm for arm in self._arms if self._status[arm.label] == "running"]
        for arm in running:
            self._read(arm)
        if self._live is not None:
            self._live.update(Group(*(self._line(arm) for arm in self._arms)), refresh=force)
        else:
            for arm in running:
                self._console.print(self._line(arm), soft_wrap=True)

    def _read(self, arm: Arm) -> None:
        events, self._offsets[arm.label] = tail(arm.folder, self._offsets[arm.label])
        for event in events:
            if event.type == "metrics" and event.data["samples"] is not None:
                self._samples[arm.label] = event.data["samples"]
                self._metrics[arm.label].update(numbers(event))

    def _line(self, arm: Arm) -> Text:
        style = {"finished": "green", "failed": "red", "running": "cyan"}.get(self._status[arm.label], "dim")
        metrics, samples = self._metrics[arm.label], self._samples[arm.label]
        news = [f"{name} {metrics[key]:.4g}" for key, name in _SHOWN.items() if key in metrics]
        words = "  ".join([_fraction(arm, samples), *news]) if news else ""
        return Text.assemble(f"{arm.label:<32} ", (f"{self._status[arm.label]:<12}", style), words)


def _fraction(arm: Arm, samples: int) -> str:
    budget = arm.run.budget
    limits = [budget.samples, budget.steps * arm.run.train.batch_size if budget.steps else None]
    total = min((limit for limit in limits if limit), default=None)
    return f"{samples}/{total} samples" if total else f"{samples} samples"
