"""Searches: optuna proposes settings from what the earlier ones measured; here they become arms, and their results values."""

import dataclasses
import math
import socket
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import ConfigError
from hdm.launch.arm import Arm, compose_setting
from hdm.launch.grammar import Point, SweepAxis, intervals, points
from hdm.launch.options import Pruner, Search, SweepOptions
from hdm.launch.study import Trials, open_study, patiently
from hdm.track.events import latest_metrics, read, series

if TYPE_CHECKING:
    import optuna


class Explorer:
    """The trials of one search. A trial is a setting with all its seeds, and its value their mean.

    Its state is the study alone: a launcher that comes back makes the same arms of the trials that are there.
    """

    def __init__(self, folder: Path, *, name: str, axes: Iterable[SweepAxis], fixed: Sequence[str], options: SweepOptions) -> None:
        self.axes, self.fixed, self.options = list(axes), fixed, options
        self.problems: list[str] = []  # why settings cannot run
        directions = [options.direction.name] + (["minimize"] if options.search is Search.nsgaii else [])
        name = f"{name} {options.metric}"
        more: dict[str, Any] = {"heartbeat": options.heartbeat, "pruner": _pruner(options)}
        study = open_study(folder, storage=options.storage, name=name, directions=directions, **more)
        study.sampler = _sampler(options, drawn=len(study.get_trials(deepcopy=False)))
        owner = f"{socket.gethostname()}:{folder.absolute()}"
        self.trials = Trials(study, owner=owner, limit=options.trials or 0)
        self._open: dict[int, tuple[optuna.Trial, list[Arm], dict[str, str]]] = {}  # the arms of a trial, and how they ended
        self._reported: dict[int, int] = {}

    def begin(self) -> list[Arm]:
        """The arms of every trial that this launcher began before; those that are still to be told are taken up again."""
        from optuna.trial import FixedTrial

        found: list[Arm] = []
        for frozen in self.trials.mine():
            if frozen.state.name == "RUNNING":
                found += self._take_up(self.trials.resumed(frozen.number))
            else:
                found += self._arms(FixedTrial(frozen.params))
        return found

    def more(self) -> list[Arm] | None:
        """The arms of the next trial, [] when it is one that cannot run, None when there are enough."""
        trial = self.trials.ask()
        return None if trial is None else self._take_up(trial)

    def ended(self, arm: Arm, status: str) -> None:
        """Hear that `arm` has ended; a trial is told when all its arms have."""
        for number, (_, arms, ends) in list(self._open.items()):
            if arm.label in [other.label for other in arms]:
                ends[arm.label] = status
                if len(ends) == len(arms):
                    del self._open[number]
                    self._tell(number, arms, list(ends.values()))

    def falls_behind(self, arm: Arm) -> bool:
        """Report what `arm` has measured since the last time; whether it is to be stopped."""
        if self.options.pruner is Pruner.none:
            return False
        for number, (trial, arms, _) in self._open.items():
            if arm.folder != arms[0].folder:
                continue
            points, known = series(read(arm.folder), self.options.metric), self._reported.get(number, 0)
            for place, (_, value) in enumerate(points[known:], start=known + 1):  # optuna's clock: the first, second … validation
                self.trials.report(trial, value, place)
            self._reported[number] = len(points)
            return len(points) > known and bool(patiently(trial.should_prune))
        return False

    def waits(self) -> bool:
        """Whether trials of other launchers run, whose settings come here if they fall silent."""
        return self.trials.shared and self.trials.others

    def beat(self) -> None:
        """A sign of life for the running trials."""
        self.trials.beat(trial for trial, _, _ in self._open.values())

    def _take_up(self, trial: "optuna.Trial") -> list[Arm]:
        arms = self._arms(trial)
        if arms:
            self._open[trial.number] = (trial, arms, {})
        else:
            self.trials.tell(trial.number, None)
        return arms

    def _arms(self, trial: Any) -> list[Arm]:
        """The arms of the setting that `trial` proposes; [] when it cannot run."""
        point = patiently(lambda: suggested(trial, self.axes))
        try:
            return compose_setting(self.fixed, point, [point], seeds=range(self.options.seeds) if self.options.seeds else ())
        except ConfigError as error:
            self.problems.append(str(error))
            return []

    def _tell(self, number: int, arms: Sequence[Arm], ends: Sequence[str]) -> None:
        keys = [self.options.metric] + ([self.options.cost] if self.options.search is Search.nsgaii else [])
        found = [_measured(arm) for arm in arms]
        values = [statistics.fmean(m[key] for m in found) if all(key in m for m in found) else math.nan for key in keys]
        good = set(ends) == {"finished"} and all(map(math.isfinite, values))
        self.trials.tell(number, values if good else None, pruned="pruned" in ends)


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
