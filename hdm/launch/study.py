"""What is known of a sweep's points, in an optuna study, from which `optuna-dashboard` and later samplers can go on."""

import contextlib
import copy
import math
import random
import sys
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
SILENCE = 5  # times that, after which its trials are given to others
_RETRIES = 3  # of a setting whose launchers fall silent
_PATIENCE = 600.0

R = TypeVar("R")


def open_study(
    folder: Path, *, storage: str | None, name: str, directions: Sequence[Any], heartbeat: int = HEARTBEAT, **more: Any
) -> "optuna.Study":
    """The study `name`, made where it is missing: a journal in `folder`, or a database, whose tables one process at a time makes.

    `heartbeat`: seconds between the signs of life that a database asks for. Raises ConfigError for a storage that optuna does not
    know, HdmError for a database that does not answer.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")  # we tell it ourselves
    if storage is None:
        kept: Any = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
        return optuna.create_study(storage=kept, study_name=name, directions=list(directions), load_if_exists=True, **more)
    if "://" not in storage:
        raise ConfigError(f"storage={storage}: expected sqlite:///FILE.db or postgresql://USER@HOST/DATABASE")

    def opened() -> "optuna.Study":
        with alone(storage):
            kept = RDBStorage(
                storage,
                heartbeat_interval=heartbeat,
                grace_period=SILENCE * heartbeat,
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

    A database that is away for a while is waited for. What it did without answering is found again: a trial that nobody owns, or
    whose launcher gives no sign of life, has failed and its setting is queued again; one that is told twice keeps its first value.
    """

    def __init__(self, study: "optuna.Study", *, owner: str, limit: int) -> None:
        from optuna.storages import RDBStorage

        storage = getattr(study._storage, "_backend", study._storage)
        self.study, self.owner, self.limit = study, owner, limit
        self.others = False  # whether other launchers were at work when there were enough trials
        self._database: RDBStorage | None = storage if isinstance(storage, RDBStorage) else None
        self._heartbeat = float((self._database and self._database.heartbeat_interval) or HEARTBEAT)
        self._beat = self._looked = self._enough = -math.inf

    @property
    def shared(self) -> bool:
        """Whether other launchers may take part."""
        return self._database is not None

    def mine(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials of this owner so far; not those that were given to others."""
        return [trial for trial in self._all() if trial.user_attrs.get("owner") == self.owner and not _given_up(trial)]

    def resumed(self, number: int) -> "optuna.Trial":
        """A running trial to go on with."""
        import optuna

        frozen = next(trial for trial in self.mine() if trial.number == number)
        return patiently(lambda: optuna.Trial(self.study, frozen._trial_id))

    def ask(self) -> "optuna.Trial | None":
        """The next trial, None when there are enough."""
        from optuna.exceptions import UpdateFinishedTrialError

        if time.monotonic() < self._enough + self._heartbeat / 4:
            return None
        self._look_for_the_lost()
        while self._count() < self.limit:
            trial = patiently(self.study.ask)
            try:
                self._record_beat(trial)  # first: a trial with an owner that never gave a sign would be waited for
                patiently(partial(trial.set_user_attr, "owner", self.owner))
            except UpdateFinishedTrialError:  # the database was away for so long that others gave it up
                continue
            if trial.number < self.limit or self._count(before=trial.number) < self.limit:
                return trial
            self._end(trial.number, None, "superfluous")  # another launcher took the last one at the same time
        self._enough = time.monotonic()
        return None

    def tell(self, number: int, values: Sequence[float] | None, *, pruned: bool = False) -> None:
        """End a trial; without values it failed, or was pruned."""
        self._end(number, values, "pruned" if pruned else "failed")

    def report(self, trial: "optuna.Trial", value: float, place: int) -> None:
        """What a running trial measured."""
        from optuna.exceptions import UpdateFinishedTrialError

        with contextlib.suppress(UpdateFinishedTrialError):  # it was given to others
            patiently(lambda: trial.report(value, place))

    def beat(self, trials: Iterable["optuna.Trial"]) -> None:
        """A sign of life for running trials; databases alone ask for it."""
        if self._database is None or time.monotonic() - self._beat < self._heartbeat:
            return
        self._beat = time.monotonic()
        for trial in trials:
            self._record_beat(trial)

    def _record_beat(self, trial: "optuna.Trial") -> None:
        if (database := self._database) is not None:
            patiently(lambda: database.record_heartbeat(trial._trial_id))

    def _end(self, number: int, values: Sequence[float] | None, how: str) -> None:
        """End a trial. A failure that is told says so: without a word it means that its launcher fell silent."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        state = None if values else TrialState.PRUNED if how == "pruned" else TrialState.FAIL
        with contextlib.suppress(UpdateFinishedTrialError):
            if state is TrialState.FAIL and how:
                identity = self.study._storage.get_trial_id_from_study_id_trial_number
                trial = patiently(lambda: identity(self.study._study_id, number))
                patiently(lambda: self.study._storage.set_trial_user_attr(trial, "ended", how))
            patiently(lambda: self.study.tell(number, values or None, state=state, skip_if_finished=True))

    def _all(self) -> "list[optuna.trial.FrozenTrial]":
        return patiently(lambda: self.study.get_trials(deepcopy=False))

    def _count(self, *, before: float = math.inf) -> int:
        """Trials that are running, have ended, or failed by themselves."""
        trials = [trial for trial in self._all() if trial.number < before]
        self.others = any(t.state.name == "RUNNING" and t.user_attrs.get("owner") != self.owner for t in trials)
        return sum(
            t.state.name in ("RUNNING", "COMPLETE", "PRUNED")
            or t.user_attrs.get("ended") == "failed"
            or (_given_up(t) and _history(t) >= _RETRIES)
            for t in trials
        )

    def _look_for_the_lost(self) -> None:
        """End what nobody works at any more, and queue its settings again."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials

        if time.monotonic() - self._looked < self._heartbeat / 4:
            return
        self._looked = time.monotonic()
        patiently(lambda: fail_stale_trials(self.study))
        for trial in self._all():
            if trial.state.name == "RUNNING" and "owner" not in trial.user_attrs and _age(trial) > self._heartbeat:
                self._end(trial.number, None, "")
        again = RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)

        def queue() -> None:
            with alone(str(self._database.url)) if self._database else contextlib.nullcontext():
                for trial in self._lost():
                    trial.user_attrs = {}
                    again(self.study, trial)

        if self._lost():
            patiently(queue)

    def _lost(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials that were given up and are not queued again."""
        trials = self._all()
        queued = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
        lost = [t for t in trials if _given_up(t) and t.number not in queued and _history(t) < _RETRIES]
        return [copy.deepcopy(trial) for trial in lost if trial.params or "owner" in trial.user_attrs]


def patiently(call: Callable[[], R], *, before_again: Callable[[], object] | None = None, seconds: float = _PATIENCE) -> R:
    """What `call` returns, tried again for so many seconds while the database does not answer. Raises HdmError after that."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    deadline, wait, again = time.monotonic() + seconds, 0.25, False
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
                    f"storage: {redact(' '.join(str(error.__cause__ or error).split())[:200])}; give the same command again later"
                ) from None
            if wait == 2.0:  # a restart is over by then
                why = redact(" ".join(str(error.__cause__ or error).split())[:200])
                print(f"storage: {why}; waiting for it", file=sys.stderr, flush=True)
            time.sleep(wait * random.uniform(0.5, 1.0))  # many that wait do not come back all at once
            wait, again = min(2 * wait, 30.0), True


def _given_up(trial: "optuna.trial.FrozenTrial") -> bool:
    """Whether it failed without a word of its launcher."""
    return trial.state.name == "FAIL" and "ended" not in trial.user_attrs


def _history(trial: "optuna.trial.FrozenTrial") -> int:
    """How often its setting was tried before."""
    return len(trial.system_attrs.get("retry_history", []))


def _age(trial: "optuna.trial.FrozenTrial") -> float:
    """Seconds since the trial began."""
    return (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
