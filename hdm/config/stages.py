"""Progressive stages: each is the run with other lines, trained one after the other (report, "Recipe").

In a file and on the command line a stage is what stands behind `stages.NAME.`: `images`, `epochs`, `steps` and `moments` are its
own (`StageConfig`), anything else is a key of the run that differs in it. Stages train in the order in which they are first named.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from hdm.config.errors import ConfigError, suggest
from hdm.config.lines import Line, quote
from hdm.config.schema import RunConfig, StageConfig

_NAMED = re.compile(r"stages\.([^.=]+)\.([^=]+)")
_OWN = [f.name for f in fields(StageConfig) if f.name not in ("name", "set")]
# What may differ between stages: what is seen and how it is learned from, never what is learned.
_MAY_DIFFER = (
    "data crop captions train optimizer schedule timestep objective routing text_encoder.max_length text_encoder.dtype"
    " model.gradient_checkpointing validation sampling sampler guidance"
).split()
_SAME_VARIANT = ("optimizer", "routing")  # other variants may have other parameters or moments


@dataclass(slots=True)
class _Stage:
    own: dict[str, str] = field(default_factory=dict)
    set: dict[str, Line] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """(stage, key of the run) of `stages.NAME.KEY`; None for any other key."""
    found = _NAMED.fullmatch(key)
    return (found[1], found[2]) if found else None


def collect(lines: Iterable[Line], parse: Callable[[str], Any]) -> list[Line]:
    """`lines` with those of stages gathered into one line `stages=[…]`; `parse` reads a whole list that a line sets.

    Raises ConfigError for a key that is the same in all stages of a run.
    """
    stages: dict[str, _Stage] = {}
    rest: list[Line] = []
    listed: Line | None = None
    named = False
    for line in lines:
        if line.key == "stages":
            listed, named, stages = line, False, {}
        elif (key := split_key(line.key)) is not None:
            if listed is not None and not stages:
                stages = _listed(parse(f"stages={listed.value}"))
            named = True
            name, inner = key
            stage = stages.setdefault(name, _Stage())
            if inner in _OWN:
                stage.own[inner] = line.value
            elif _may_differ(inner):
                stage.set[inner] = line
            else:
                raise ConfigError(f"{line}: {_not_a_stage_key(inner)}")
        else:
            rest.append(line)
    if not named:
        return rest if listed is None else [*rest, listed]
    for line in rest:  # on the command line it would change nothing where every stage of a file sets its own
        own = [stage.set[line.key].source for stage in stages.values() if line.key in stage.set]
        if line.source == "command line" and len(own) == len(stages) and line.source not in own:
            first = next(iter(stages))
            raise ConfigError(f"{line}: every stage sets its own; set stages.{first}.{line.key}={line.value}, and so on")
    return [*rest, Line("stages", "[" + ",".join(_written(name, stage) for name, stage in stages.items()) + "]")]


def _may_differ(key: str) -> bool:
    return key not in _SAME_VARIANT and (key in _MAY_DIFFER or key.partition(".")[0] in _MAY_DIFFER)


def _not_a_stage_key(key: str) -> str:
    may = [*_OWN, *_MAY_DIFFER]
    if key.partition(".")[0] not in {f.name for f in fields(RunConfig)}:
        return f"no such key '{key}'{suggest(key, may)}"
    return f"is the same in all stages; set {key} for the whole run. Stages may differ in {', '.join(may)}"


def _listed(stages: Any) -> dict[str, _Stage]:
    found: dict[str, _Stage] = {}
    for stage in stages:
        own = {key: quote(stage[key]) for key in _OWN if key in stage}
        lines = [Line(*str(line).partition("=")[::2], "stages") for line in stage.get("set", [])]
        found[str(stage.get("name", ""))] = _Stage(own, {line.key: line for line in lines})
    return found


def _written(name: str, stage: _Stage) -> str:
    own = "".join(f",{key}:{value}" for key, value in stage.own.items())
    lines = [f"{key}={line.value}" for key, line in stage.set.items()]
    return f"{{name:{quote(name)}{own},set:{quote(lines)}}}"


def check_stages(run: RunConfig) -> None:
    """Raise ConfigError for stages that have no name, share one, or never end."""
    names = [stage.name for stage in run.stages]
    for stage in run.stages:
        where = f"stages.{stage.name}"
        if not stage.name or "." in stage.name or names.count(stage.name) > 1:
            raise ConfigError(f"stages: '{stage.name}' must be a name of its own, without dots, such as 256px")
        for key in ("images", "epochs", "steps"):
            value = getattr(stage, key)
            if value is not None and value <= 0:
                raise ConfigError(f"{where}.{key}={value}: must be above 0")
        if (stage.steps is None) == (stage.epochs is None):
            raise ConfigError(f"{where}: set one of {where}.epochs and {where}.steps, and the other to null")
