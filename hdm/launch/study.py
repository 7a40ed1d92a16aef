"""What is known of a sweep's points, in an optuna study, from which `optuna-dashboard` and later samplers can go on."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import ConfigError, HdmError
from hdm.track.events import redact
from hdm.track.uri import alone

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 60  # seconds between two signs of life of a launcher, in databases
_GRACE = 300  # seconds of silence after which its trials are given to others


def open_study(folder: Path, *, storage: str | None, name: str, directions: Sequence[Any], **more: Any) -> "optuna.Study":
    """The study `name`, made where it is missing: a journal in `folder`, or a database, whose tables one process at a time makes.

    Raises ConfigError for a storage that optuna does not know, HdmError for a database that does not answer.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage, RetryFailedTrialCallback
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")  # we tell it ourselves
    if storage is None:
        kept: Any = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
        return optuna.create_study(storage=kept, study_name=name, directions=list(directions), load_if_exists=True, **more)
    if "://" not in storage:
        raise ConfigError(f"storage={storage}: expected sqlite:///FILE.db or postgresql://USER@HOST/DATABASE")
    retry = RetryFailedTrialCallback(max_retry=3)
    try:
        with alone(storage):
            kept = RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=retry,
                engine_kwargs={"pool_pre_ping": True},  # a server that was restarted is connected to again
            )
            return optuna.create_study(storage=kept, study_name=name, directions=list(directions), load_if_exists=True, **more)
    except HdmError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HdmError(f"storage={redact(storage)}: {redact(reason)}; is the database there, and psycopg installed?") from None


class Study:
    """The study of one grid and one primary metric. The grid is explicit, so every trial is enqueued and no sampler draws."""

    def __init__(
        self,
        folder: Path,
        *,
        axes: Mapping[str, Sequence[str]],
        metric: str,
        direction: str,
        storage: str | None = None,
        sweep: str = "",
    ) -> None:
        import optuna

        self._axes = {key: sorted(values) for key, values in axes.items()}  # optuna holds on to the order that it saw first
        name = f"{metric} ({direction})" if storage is None else f"{sweep} {metric} ({direction})"
        sampler = optuna.samplers.RandomSampler(seed=0)
        self._study = open_study(folder, storage=storage, name=name, directions=[direction], sampler=sampler)
        self._known: dict[tuple[tuple[str, str], ...], tuple[int, str]] = {}  # by point: its newest trial's number and state
        for trial in self._study.get_trials(deepcopy=False):
            self._known[tuple(sorted(trial.params.items()))] = (trial.number, trial.state.name)

    def ask(self, point: Mapping[str, str]) -> None:
        """Begin the trial of `point`, unless one is running or complete."""
        if self._state(point) in ("RUNNING", "COMPLETE"):
            return
        self._study.enqueue_trial(dict(point))
        trial = self._study.ask()
        for key in point:
            trial.suggest_categorical(key, self._axes[key])
        self._known[tuple(sorted(point.items()))] = (trial.number, "RUNNING")

    def tell(self, point: Mapping[str, str], value: float | None) -> None:
        """End the trial of `point` with its value; without a finite one it failed."""
        from optuna.trial import TrialState

        self.ask(point)
        if self._state(point) != "RUNNING":
            return
        key = tuple(sorted(point.items()))
        number, _ = self._known[key]
        good = value is not None and math.isfinite(value)
        self._study.tell(number, value if good else None, state=None if good else TrialState.FAIL)
        self._known[key] = (number, "COMPLETE" if good else "FAIL")

    def values(self) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of every complete trial by its point."""
        return {tuple(t.params.items()): t.values[0] for t in self._study.trials if t.state.name == "COMPLETE"}

    def _state(self, point: Mapping[str, str]) -> str:
        return self._known.get(tuple(sorted(point.items())), (-1, ""))[1]
