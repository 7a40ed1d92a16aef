"""Searches: optuna proposes settings from what the earlier ones measured; here they become arms, and their results values."""

import dataclasses
import math
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import ConfigError
from hdm.launch.arm import Arm, compose_setting
from hdm.launch.grammar import Point, SweepAxis, intervals, points
from hdm.launch.options import Pruner, Search, SweepOptions
from hdm.launch.study import HEARTBEAT, open_study
from hdm.track.events import latest_metrics, read, series

if TYPE_CHECKING:
    import optuna


class Explorer:
    """The trials of one search. A trial is a setting with all its seeds, and its value their mean.

    Its state is the study alone: a launcher that comes back makes the same arms of the trials that are there.
    """

    def __init__(self, folder: Path, *, name: str, axes: Iterable[SweepAxis], fixed: Sequence[str], options: SweepOptions) -> None:
        self.axes, self.fixed, self.options = list(axes), fixed, options
        self.problems: dict[str, str] = {}  # settings that cannot run, with the reason
        directions = [options.direction.name] + (["minimize"] if options.search is Search.nsgaii else [])
        more: dict[str, Any] = {"pruner": _pruner(options)}
        self._study = open_study(folder, storage=options.storage, name=f"{name} {options.metric}", directions=directions, **more)
        self._study.sampler = _sampler(options, drawn=len(self._study.get_trials(deepcopy=False)))
        self._owner = f"{socket.gethostname()}:{folder.absolute()}"
        self._open: dict[int, tuple[Any, list[Arm]]] = {}
        self._reported: dict[int, int] = {}
        self._beat = -math.inf

    def begin(self) -> list[Arm]:
        """The arms of every trial that this launcher began before; those that are still to be told are taken up again."""
        import optuna

        found: list[Arm] = []
        for frozen in self._study.get_trials(deepcopy=False):
            if frozen.user_attrs.get("owner") != self._owner:
                continue
            running = frozen.state.name == "RUNNING"
            trial = optuna.Trial(self._study, frozen._trial_id) if running else optuna.trial.FixedTrial(frozen.params)
            found += self._arms(trial, frozen.number, take_up=running)
        return found

    def more(self, count: int) -> list[Arm]:
        """The arms of up to `count` further trials, as long as there are trials to be made."""
        from optuna.storages import fail_stale_trials

        arms: list[Arm] = []
        while count > 0 and len(self._study.get_trials(deepcopy=False)) < (self.options.trials or 0):
            fail_stale_trials(self._study)
            trial = self._study.ask()
            trial.set_user_attr("owner", self._owner)
            arms += self._arms(trial, trial.number, take_up=True)
            count -= 1
        return arms

    def ended(self, arm: Arm, status: str) -> None:
        """Hear that `arm` has ended; a trial is told when all its arms have."""
        for number, (trial, arms) in list(self._open.items()):
            if arm.folder not in [other.folder for other in arms]:
                continue
            trial.set_user_attr(arm.label, status)
            ends = [trial.study._storage.get_trial(trial._trial_id).user_attrs.get(other.label) for other in arms]
            if all(ends):
                del self._open[number]
                self._tell(number, arms, ends)

    def falls_behind(self, arm: Arm) -> bool:
        """Report what `arm` has measured since the last time; whether it is to be stopped."""
        if self.options.pruner is Pruner.none:
            return False
        for number, (trial, arms) in self._open.items():
            if arm.folder != arms[0].folder:
                continue
            points, known = series(read(arm.folder), self.options.metric), self._reported.get(number, 0)
            for place, (_, value) in enumerate(points[known:], start=known + 1):  # optuna's clock: the first, second … validation
                trial.report(value, place)
            self._reported[number] = len(points)
            return len(points) > known and bool(trial.should_prune())
        return False

    def beat(self) -> None:
        """A sign of life for the trials of this launcher, where the study is in a database."""
        if self.options.storage is None or time.monotonic() - self._beat < HEARTBEAT:
            return
        self._beat = time.monotonic()
        for trial, _ in self._open.values():
            trial.study._storage.record_heartbeat(trial._trial_id)

    def best(self) -> list[Point]:
        """The settings that nothing else is better than in everything that is weighed."""
        import optuna

        complete = any(t.state.name == "COMPLETE" for t in self._study.get_trials(deepcopy=False))
        return [suggested(optuna.trial.FixedTrial(t.params), self.axes) for t in self._study.best_trials] if complete else []

    def _arms(self, trial: Any, number: int, *, take_up: bool) -> list[Arm]:
        from optuna.trial import TrialState

        point = suggested(trial, self.axes)
        try:
            arms = compose_setting(self.fixed, point, [point], seeds=range(self.options.seeds) if self.options.seeds else ())
        except ConfigError as error:
            self.problems[" ".join(f"{k}={v}" for k, v in point.label.items())] = str(error)
            if take_up:
                self._study.tell(number, state=TrialState.FAIL)
            return []
        if take_up:
            self._open[number] = (trial, arms)
        return arms

    def _tell(self, number: int, arms: Sequence[Arm], ends: Sequence[str | None]) -> None:
        from optuna.trial import TrialState

        if "pruned" in ends:
            self._study.tell(number, state=TrialState.PRUNED)
            return
        found = [_measured(arm) for arm in arms]
        keys = [self.options.metric] + ([self.options.cost] if self.options.search is Search.nsgaii else [])
        values = [statistics.fmean(m[key] for m in found) if all(key in m for m in found) else math.nan for key in keys]
        if set(ends) == {"finished"} and all(map(math.isfinite, values)):
            self._study.tell(number, values)
        else:
            self._study.tell(number, state=TrialState.FAIL)


def suggested(trial: Any, axes: Iterable[SweepAxis], above: str = "") -> Point:
    """The setting that `trial` proposes: a value for every axis, and for the axes that the value brings along."""
    point = Point(label={}, lines={})
    for axis in axes:
        name = f"{above}{axis.key}"
        if axis.interval is None:
            value = trial.suggest_categorical(name, sorted(choice.value for choice in axis.choices))
        elif axis.interval.integer:
            value = str(trial.suggest_int(name, int(axis.interval.low), int(axis.interval.high), log=axis.interval.log))
        else:
            value = f"{trial.suggest_float(name, axis.interval.low, axis.interval.high, log=axis.interval.log):.6g}"
        choice = axis.with_(value)
        below = suggested(trial, choice.below, f"{name}={value}/")
        point.label |= {axis.key: value} | below.label
        point.lines |= choice.lines | below.lines
    return point


def check_search(axes: Sequence[SweepAxis], fixed: Sequence[str], options: SweepOptions) -> None:
    """Raise ConfigError for a search that cannot work: the ends of its intervals and every value of its lists are composed once."""
    if options.search is Search.cmaes and not intervals(axes):
        raise ConfigError("search=cmaes: works on numbers; give a key an interval(low,high), or choose search=tpe")
    for high in (False, True):
        ends = [_end(axis, high=high) for axis in axes]
        for point in {str(p.label): p for p in _each_value(ends)}.values():
            compose_setting(fixed, point, [point])


def _each_value(axes: Sequence[SweepAxis]) -> list[Point]:
    """Settings that together show every value of every axis: the first ones, and each other value in their midst."""
    first = [SweepAxis(key=axis.key, choices=axis.choices[:1]) for axis in axes]
    found = list(points(first))[:1]
    for place, axis in enumerate(axes):
        found += points([*first[:place], SweepAxis(key=axis.key, choices=axis.choices[1:]), *first[place + 1 :]])
    return found


def _end(axis: SweepAxis, *, high: bool) -> SweepAxis:
    """`axis` with one end of each interval in its place."""
    if axis.interval is not None:
        number = axis.interval.high if high else axis.interval.low
        return SweepAxis(key=axis.key, choices=[axis.with_(str(int(number)) if axis.interval.integer else f"{number:.6g}")])
    choices = [dataclasses.replace(choice, below=[_end(below, high=high) for below in choice.below]) for choice in axis.choices]
    return SweepAxis(key=axis.key, choices=choices)


def _measured(arm: Arm) -> dict[str, float]:
    return latest_metrics(read(arm.folder)) | (arm.outcome.metrics if arm.outcome else {})


def _sampler(options: SweepOptions, *, drawn: int) -> "optuna.samplers.BaseSampler":
    """optuna's sampler. It draws with a seed of its own after every restart, else it would propose the first settings again."""
    from optuna import samplers

    match options.search:
        case Search.tpe:
            return samplers.TPESampler(seed=drawn, constant_liar=True, multivariate=False)
        case Search.cmaes:
            return samplers.CmaEsSampler(seed=drawn, warn_independent_sampling=False)
        case Search.nsgaii:
            return samplers.NSGAIISampler(seed=drawn, population_size=max(4, min(50, (options.trials or 0) // 4)))
    return samplers.RandomSampler(seed=drawn)


def _pruner(options: SweepOptions) -> "optuna.pruners.BasePruner":
    from optuna import pruners

    match options.pruner:
        case Pruner.median:
            return pruners.MedianPruner(n_startup_trials=4)
        case Pruner.hyperband:
            return pruners.HyperbandPruner(min_resource=1, max_resource="auto")
    return pruners.NopPruner()
