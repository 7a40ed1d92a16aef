"""What is known of a sweep's points, in an optuna study, from which `optuna-dashboard` and later samplers can go on."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hdm.config.errors import ConfigError, HdmError
from hdm.track.events import redact
from hdm.track.uri import alone

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 60  # seconds between two signs of life of a launcher, in databases
_GRACE = 300  # seconds of silence after which its trials are given to others
_ORPHANED = 60.0  # seconds after which a trial without an owner has none
_PATIENCE = 600.0

R = TypeVar("R")


def open_study(folder: Path, *, storage: str | None, name: str, directions: Sequence[Any], **more: Any) -> "optuna.Study":
    """The study `name`, made where it is missing: a journal in `folder`, or a database, whose tables one process at a time makes.

    Raises ConfigError for a storage that optuna does not know, HdmError for a database that does not answer.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")  # we tell it ourselves
    if storage is None:
        kept: Any = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
        return optuna.create_study(storage=kept, study_name=name, directions=list(directions), load_if_exists=True, **more)
    if "://" not in storage:
        raise ConfigError(f"storage={storage}: expected sqlite:///FILE.db or postgresql://USER@HOST/DATABASE")
    retry = RetryHeartbeatStaleTrialCallback(max_retry=3)

    def opened() -> "optuna.Study":
        with alone(storage):
            kept = RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=retry,
                engine_kwargs={"pool_pre_ping": True},  # a server that was restarted is connected to again
            )
            return optuna.create_study(storage=kept, study_name=name, directions=list(directions), load_if_exists=True, **more)

    try:
        return patiently(opened, seconds=60)  # it may be restarting
    except HdmError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HdmError(f"storage={redact(storage)}: {redact(reason)}; is the database there, and psycopg installed?") from None


class Study:
    """The study of one grid and one primary metric: every point that has ended is a trial, and no sampler draws."""

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
        self._complete: set[tuple[tuple[str, str], ...]] = set()
        self._learn()

    def tell(self, point: Mapping[str, str], value: float | None) -> None:
        """Add the trial of `point` with its value, unless one is complete; without a finite value it failed."""
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        key = tuple(sorted(point.items()))
        good = value is not None and math.isfinite(value)
        trial = create_trial(
            state=TrialState.COMPLETE if good else TrialState.FAIL,
            value=value if good else None,
            params=dict(point),
            distributions={name: CategoricalDistribution(self._axes[name]) for name in point},
        )

        def add() -> None:
            if key not in self._complete:
                self._study.add_trial(trial)

        patiently(add, before_again=self._learn)  # it may have arrived without an answer
        if good:
            self._complete.add(key)

    def values(self) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of every complete trial by its point."""
        return {tuple(t.params.items()): t.values[0] for t in self._study.trials if t.state.name == "COMPLETE"}

    def _learn(self) -> None:
        done = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        self._complete |= {tuple(sorted(trial.params.items())) for trial in done}


class Trials:
    """The trials of a search. Several launchers may share them; each knows its own by `owner`.

    A database that is away for a while is waited for. What it did without answering is found again: trials that nobody owns have
    failed, and a trial that is told twice keeps its first value.
    """

    def __init__(self, study: "optuna.Study", *, owner: str, limit: int) -> None:
        self.study, self.owner, self.limit = study, owner, limit
        self._beat = -math.inf

    def mine(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials of this owner so far."""
        trials = patiently(lambda: self.study.get_trials(deepcopy=False))
        return [trial for trial in trials if trial.user_attrs.get("owner") == self.owner]

    def resumed(self, number: int) -> "optuna.Trial":
        """A running trial to go on with."""
        import optuna

        frozen = next(trial for trial in self.mine() if trial.number == number)
        return optuna.Trial(self.study, frozen._trial_id)

    def ask(self) -> "optuna.Trial | None":
        """The next trial, None when there are enough."""
        from optuna.storages import fail_stale_trials

        patiently(lambda: fail_stale_trials(self.study))
        if self._count() >= self.limit:
            return None
        trial = patiently(self.study.ask)
        patiently(lambda: trial.set_user_attr("owner", self.owner))
        return trial

    def tell(self, number: int, values: Sequence[float] | None, *, pruned: bool = False) -> None:
        """End a trial; without values it failed, or was pruned."""
        from optuna.trial import TrialState

        state = None if values else TrialState.PRUNED if pruned else TrialState.FAIL
        patiently(lambda: self.study.tell(number, values or None, state=state, skip_if_finished=True))

    def beat(self, trials: Iterable["optuna.Trial"]) -> None:
        """A sign of life for running trials; databases alone ask for it."""
        from optuna.storages import RDBStorage

        storage = getattr(self.study._storage, "_backend", self.study._storage)
        if not isinstance(storage, RDBStorage) or time.monotonic() - self._beat < HEARTBEAT:
            return
        self._beat = time.monotonic()
        for trial in trials:
            patiently(partial(storage.record_heartbeat, trial._trial_id))

    def _count(self) -> int:
        """Trials that somebody owns or will; those that a lost answer left without an owner are ended."""
        from optuna.trial import TrialState

        trials = patiently(lambda: self.study.get_trials(deepcopy=False))
        lost = [t for t in trials if t.state is TrialState.RUNNING and "owner" not in t.user_attrs and _age(t) > _ORPHANED]
        for trial in lost:
            self.tell(trial.number, None)
        return sum("owner" in t.user_attrs or t.state in (TrialState.RUNNING, TrialState.WAITING) for t in trials) - len(lost)


def patiently(call: Callable[[], R], *, before_again: Callable[[], object] | None = None, seconds: float = _PATIENCE) -> R:
    """What `call` returns, tried again for so many seconds while the database does not answer. Raises HdmError after that."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    deadline, wait, again = time.monotonic() + seconds, 0.5, False
    while True:
        try:
            if again and before_again:
                before_again()
            return call()
        except (StorageInternalError, SQLAlchemyError) as error:
            if isinstance(error, ArgumentError):
                raise
            if time.monotonic() + wait > deadline:
                raise HdmError(
                    f"storage: {redact(' '.join(str(error).split())[:200])}; give the same command again later"
                ) from None
            time.sleep(wait)
            wait, again = min(2 * wait, 30.0), True


def _age(trial: "optuna.trial.FrozenTrial") -> float:
    """Seconds since the trial began."""
    return (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
