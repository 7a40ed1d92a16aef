"""What a sweep is asked to do besides what it compares: the options that stand beside the configuration's keys."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hdm.config.errors import ConfigError, suggest
from hdm.config.registry import option


class Search(Enum):
    """Where the next arm comes from: every combination, chance, or what the earlier arms measured."""

    grid = "grid"
    random = "random"
    tpe = "tpe"
    cmaes = "cmaes"
    nsgaii = "nsgaii"


class Pruner(Enum):
    """Which arms of a search are stopped before their end."""

    none = "none"
    median = "median"
    hyperband = "hyperband"


class Direction(Enum):
    """Which of two values of the metric is better."""

    minimize = "minimize"
    maximize = "maximize"


class Iso(Enum):
    """What all arms get as much of as the baseline."""

    steps = "steps"
    samples = "samples"
    flops = "flops"
    seconds = "seconds"
    parameters = "parameters"


class Cluster(Enum):
    """Where arms run."""

    local = "local"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class LauncherOptions:
    """What every job of a sweep gets; `launcher.KEY=VALUE`."""

    nodes: int = option(1, "machines of one arm (slurm)")
    tasks: int = option(1, "processes of one arm on each machine")
    gpus: int = option(0, "GPUs of one arm on each machine (slurm); locally every process has one")
    cpus: int | None = option(None, "cores of each process (slurm)")
    memory_gb: float | None = option(None, "memory of each machine (slurm)")
    minutes: int = option(240, "time limit of a job (slurm); an arm that takes longer saves and queues again")
    grace: int = option(120, "seconds before the time limit at which an arm is told to save (slurm)")
    poll: int = option(15, "seconds between two questions to the cluster; results are seen at once, in the shared folder (slurm)")
    partition: str | None = option(None, "partition (slurm)")
    account: str | None = option(None, "account (slurm)")
    qos: str | None = option(None, "quality of service (slurm)")
    constraint: str | None = option(None, "features that nodes must have (slurm)")
    setup: list[str] = option([], "shell lines before the arm, such as 'module load cuda' (slurm)")


@dataclass(kw_only=True, slots=True)
class SweepOptions:
    """What a sweep is asked to do; `KEY=VALUE` on its command line, or `KEY: VALUE` in its file."""

    seeds: int | None = option(None, "repeat every setting with seeds 0 … N-1")
    metric: str = option("val/loss", "primary metric: what arms are ranked by")
    direction: Direction = option(Direction.minimize, "maximize where more of the metric is better")
    iso: Iso | None = option(None, "every arm gets as many steps, samples, flops, seconds or parameters as the baseline")
    baseline: str | None = option(None, "setting that the others are compared with; null: the first one")
    noise_floor: str | None = option(None, "name of an A/A sweep, whose differences are noise")
    alpha: float = option(0.05, "probability of a false positive, over all comparisons of the sweep")
    confirmatory: bool | None = option(None, "the sweep tests a claim; null: it does when it is a whole grid")
    search: Search = option(Search.grid, "grid, random, tpe, cmaes, or nsgaii for quality against cost")
    trials: int | None = option(None, "settings that a search tries")
    cost: str = option("cost/flops", "what nsgaii trades the metric for; less is better")
    pruner: Pruner = option(Pruner.none, "stop arms of a search that fall behind: median or hyperband")
    storage: str | None = option(
        None, "where optuna keeps the study: sqlite:///… or postgresql://…; null: a journal in the sweep's folder"
    )
    heartbeat: int = option(60, "seconds between signs of life in such a database; after five without one a trial is queued again")
    parallel: int | None = option(None, "arms at once; null: locally one for every GPU, else 1; on slurm as many as it gives")
    retry_failed: bool = option(True, "start arms again that failed before")
    launcher: Cluster = option(Cluster.local, "local or slurm")
    job: LauncherOptions = option(LauncherOptions(), "what a job gets")

    @classmethod
    def read(cls, values: Mapping[str, object]) -> "SweepOptions":
        """Options from `take`n values, texts or what YAML holds. Raises ConfigError for what is impossible."""
        job = LauncherOptions(**{k.removeprefix("launcher."): _typed(k, v) for k, v in values.items() if k.startswith("launcher.")})
        made = cls(job=job, **{key: _typed(key, value) for key, value in values.items() if "." not in key})
        made.check()
        return made

    def check(self) -> None:
        """Raise ConfigError for options that cannot go together."""
        for key in ("seeds", "parallel", "trials", "heartbeat"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: expected a whole number above 0")
        for name in ("nodes", "tasks", "minutes", "grace", "poll"):
            if getattr(self.job, name) < 1:
                raise ConfigError(f"launcher.{name}={getattr(self.job, name)}: expected a whole number above 0")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha={self.alpha}: expected a probability between 0 and 1, such as 0.05")
        if self.launcher is Cluster.local and self.job.nodes > 1:
            raise ConfigError(
                f"launcher.nodes={self.job.nodes}: this machine is one; use launcher=slurm, or launcher.tasks for several processes"
            )
        searching = self.search is not Search.grid
        if searching and self.trials is None:
            raise ConfigError(f"search={self.search.name}: needs an end; say how many settings to try, such as trials=32")
        if not searching and self.trials is not None:
            raise ConfigError(f"trials={self.trials}: a grid tries every combination; choose search=random, tpe, cmaes or nsgaii")
        self._check_pruner()
        if self.confirmatory and searching:
            raise ConfigError(
                f"confirmatory=true: search={self.search.name} goes by what others measured; confirm its best in a grid"
            )

    def _check_pruner(self) -> None:
        if self.pruner is Pruner.none:
            return
        name = f"pruner={self.pruner.name}"
        if self.search is Search.grid:
            raise ConfigError(f"{name}: a table of a whole grid keeps every arm; drop it, or search=tpe trials=N")
        if self.confirmatory:
            raise ConfigError(f"{name}: stops arms by what they measure, so nothing is confirmed; drop it or confirmatory=true")
        if self.search is Search.nsgaii:
            raise ConfigError(f"{name}: optuna prunes by one value and nsgaii has two; drop it or use search=tpe")
        if (self.seeds or 1) > 1:
            raise ConfigError(f"{name}: goes by one curve a setting, and seeds={self.seeds} makes several; drop one of them")

    @property
    def confirms(self) -> bool:
        """Whether the sweep's table may test a claim."""
        return self.search is Search.grid if self.confirmatory is None else self.confirmatory


_KINDS: dict[str, Any] = {
    **{f.name: typing.get_type_hints(SweepOptions)[f.name] for f in dataclasses.fields(SweepOptions) if f.name != "job"},
    **{f"launcher.{f.name}": typing.get_type_hints(LauncherOptions)[f.name] for f in dataclasses.fields(LauncherOptions)},
}


def is_option(key: str) -> bool:
    """Whether `key` is an option of sweeps and not a key of the configuration. Raises ConfigError for a misspelt launcher.…"""
    if key.startswith("launcher.") and key not in _KINDS:
        raise ConfigError(f"{key}: no such option{suggest(key, _KINDS)} (options: {', '.join(k for k in _KINDS if '.' in k)})")
    return key in _KINDS


def _typed(key: str, value: object) -> Any:
    """`value`, a text or what YAML made of it, as the option's type wants it."""
    kind = _KINDS[key]
    optional = isinstance(kind, types.UnionType)
    if optional:
        if value is None or value == "null":
            return None
        kind = next(k for k in kind.__args__ if k is not type(None))
    if typing.get_origin(kind) is list:
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if issubclass(kind, Enum):
        if text not in kind.__members__:
            what = "no such launcher" if key == "launcher" else "not known"
            raise ConfigError(f"{key}={text}: {what}{suggest(text, kind.__members__)} (options: {', '.join(kind.__members__)})")
        return kind[text]
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{key}={text}: expected true or false")
        return text == "true"
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{key}={text}: expected a {'whole number above 0' if kind is int else 'number'}") from None
