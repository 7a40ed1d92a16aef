"""From the command line and YAML to a typed `RunConfig`: the only file that knows hydra and omegaconf.

Experiments and presets expand to lines `key=value` (`hdm.config.lines`); the command line's come last and win. A backbone may
imply lines on other axes, which any line of the source that chose it overrules. Hydra's grammar reads their values, OmegaConf puts
them into the typed schema. The reverse, `flatten`, writes a whole configuration as such lines; it is what runs, checkpoints and
MLflow parameters store.
"""

import dataclasses
import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm.config.axes import AXES, discover
from hdm.config.check import check
from hdm.config.domain import Domain, Interval
from hdm.config.errors import ConfigError
from hdm.config.explain import check_key, expected
from hdm.config.lines import Line, choice, expand, files, imply, quote, settle
from hdm.config.origin import with_origin
from hdm.config.schema import PRESET_GROUPS, RunConfig, StageConfig
from hdm.config.stages import collect, split_key

DEFAULT_EXPERIMENT = "openmoji_nano"


def compose(overrides: Iterable[str] = (), *, default_experiment: str | None = None) -> RunConfig:
    """The configuration that command-line `overrides` describe.

    `default_experiment` is used when they name none. Raises ConfigError, in one line, for anything that is misspelt, of the
    wrong type or impossible together.
    """
    return _composed([_parse(text) for text in overrides], default_experiment)


def _composed(lines: list[Line], default_experiment: str | None = None) -> RunConfig:
    if default_experiment and not any(line.key == "experiment" for line in lines):
        lines.insert(0, Line("experiment", default_experiment))
    lines = list(expand(lines))
    load_plugins(f"plugins={line.value}" for line in lines if line.key == "plugins")
    discover()
    final = settle(imply(collect(lines, lambda text: _hydra_parse(text).value())))
    for line in final:
        check_key(line, final)
    config = _typed(final)
    if (width := config.model.width) is not None:
        try:
            config.model = config.model.at_width(width)
        except ConfigError as error:
            raise ConfigError(f"model.width={width}: {error}") from None
    check(config)
    for stage in config.stages:
        stage_run(config, stage)
    return config


def stage_run(run: RunConfig, stage: StageConfig) -> RunConfig:
    """The run that `stage` of `run` is: the same with the stage's lines. Raises ConfigError, naming it, where they do not fit."""
    flat = {key: value for key, value in flatten(run).items() if key != "stages"}
    try:
        return from_flat(flat, stage.set)
    except ConfigError as error:
        raise ConfigError(f"stages.{stage.name}.{error}") from None


def from_flat(flat: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration that `flatten` wrote, changed by `overrides`; the experiment's file, which may differ now, is not read."""
    lines = [Line(key, quote(value), "config.json") for key, value in flat.items() if key != "experiment"]
    run = _composed([*lines, *map(_parse, overrides)])
    run.experiment = flat.get("experiment", run.experiment)
    return run


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every axis and field under its dotted key, plain values only: {"merge": "cross", "merge.pairing": "mirror", …}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in AXES:
            flat[field.name] = AXES[field.name].of(value).name
        if dataclasses.is_dataclass(value):
            flat.update({f"{field.name}.{key}": leaf for key, leaf in _leaves(value)})
        else:
            flat[field.name] = _plain(value)
    return flat


def load_plugins(overrides: Iterable[str]) -> None:
    """Import the modules that `plugins=[a,b]` overrides name, so that their variants are registered."""
    for text in overrides:
        value = _hydra_parse(text).value()
        for name in map(str, value if isinstance(value, list) else [value]):
            try:
                importlib.import_module(name)
            except ConfigError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise ConfigError(f"plugins: cannot import '{name}': {reason}; is it on PYTHONPATH?") from None


def split_sweep(overrides: Iterable[str]) -> tuple[list[str], dict[str, Domain]]:
    """Separate fixed overrides from swept keys with their values.

    Hydra's grammar: choices `a,b` or `choice(a,b)`, `range(1,4)`, `glob(*)` over the variants of an axis, `interval(0,1)`,
    `tag(log,interval(1e-4,1e-2))`, `int(interval(1,8))`.
    """
    fixed: list[str] = []
    swept: dict[str, Domain] = {}
    for text in overrides:
        override = _hydra_parse(text)
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(text)
        elif not override.is_discrete_sweep():
            swept[key] = _interval(text, override.value())
        else:
            discover()
            values = [str(v) for v in override.sweep_string_iterator()]
            if len(set(values)) < len(values):
                raise ConfigError(f"{text}: a value stands twice; name each once")
            swept[key] = values
    return fixed, swept


def _interval(text: str, value: Any) -> Interval:
    low, high, log = float(value.start), float(value.end), "log" in value.tags
    if unknown := value.tags - {"log"}:
        raise ConfigError(f"{text}: tag '{min(unknown)}' means nothing here; only log does, tag(log,interval(1e-4,1e-2))")
    if not low < high or (log and low <= 0):
        raise ConfigError(f"{text}: expected interval(low,high) with low < high{', both above 0,' if log else ''}")
    return Interval(low=low, high=high, log=log, integer=isinstance(value.start, int))


def experiment_names() -> list[str]:
    """The experiments that can be named, from ./experiments and the repository."""
    return sorted(files("experiment"))


def experiment_note(name: str) -> str:
    """The comment at the head of experiment `name`."""
    lines = files("experiment")[name].read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def experiment_lines(name: str, *, implied: bool = False) -> dict[str, str]:
    """What experiment `name` sets, by key, its bases included; with `implied`, also what its backbone implies."""
    lines = list(expand([Line("experiment", name)]))
    return {line.key: line.value for line in settle(imply(lines) if implied else lines)}


def _hydra_parse(text: str) -> Override:
    if "=" not in text:
        raise ConfigError(f"'{text}' is not of the form key=value")
    key, _, value = text.partition("=")
    if (staged := split_key(key)) is not None:  # a stage may be called 256px, which is no key of Hydra's
        override = _hydra_parse(f"{staged[1]}={value}")
        override.key_or_group = key
        return override
    if text[0] in "+~":
        raise ConfigError(
            f"{text}: keys cannot be added or removed; every key is declared (python -m hdm.variants lists them). Write key=value"
        )
    try:
        return OverridesParser.create(config_loader=_Names()).parse_overrides([text])[0]  # type: ignore[arg-type]
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text}: {reason}; quote values that hold spaces or commas, key='a, b'") from None


def _parse(text: str) -> Line:
    override = _hydra_parse(text)
    if override.is_sweep_override():
        raise ConfigError(f"{text}: names several values, a run takes one; use python -m hdm.sweep {text}")
    if override.package is not None:
        raise ConfigError(f"{text}: '@' packages are not used here; write key=value")
    return Line(override.key_or_group, text.partition("=")[2])


def _typed(lines: list[Line]) -> RunConfig:
    """The typed configuration that settled `lines` describe: the variants and presets that they choose, then each value in turn."""
    try:
        composed = OmegaConf.structured(RunConfig)
        for axis in AXES.values():
            composed[axis.name] = axis.variants[choice(axis.name, lines)].config
        for group, (presets, _) in PRESET_GROUPS.items():
            composed[group] = presets[choice(group, lines)]
        for line in lines:
            if line.key not in AXES and line.key not in PRESET_GROUPS:
                try:
                    OmegaConf.update(composed, line.key, _hydra_parse(f"{line.key}={line.value}").value(), merge=True)
                except OmegaConfBaseException as error:
                    raise _translated(error, line, lines) from None
        values: dict[str, Any] = {f.name: composed[f.name] for f in dataclasses.fields(RunConfig)}
        values = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in values.items()}
    except OmegaConfBaseException as error:
        raise _translated(error, None, lines) from None
    return with_origin(RunConfig(**values))


def _translated(error: Exception, line: Line | None, lines: list[Line]) -> ConfigError:
    """One line with the key, the value and what would be right, from omegaconf's message."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ConfigError):
            return cause
    text = "\n".join(str(cause) for cause in causes)
    match = re.search(r"full_key: (\S+)", text)
    key = match.group(1) if match else ""
    reasons = [words.splitlines()[0] for cause in causes if (words := str(cause).strip())]  # some have none
    if line is None:
        line = next((line for line in lines if key and (line.key == key or key.startswith(f"{line.key}."))), None)
    if line is None:
        return ConfigError(reasons[0])
    if key.startswith(line.key):
        return ConfigError(f"{line}: {expected(key, lines, reasons[-1])}")
    return ConfigError(f"{line}: {reasons[0]}; {expected(line.key, lines, reasons[-1])}")  # inside an item of a list


class _Names:
    """What `glob(*)` in a sweep ranges over; hydra asks a config loader for the options of a group."""

    def get_group_options(self, group: str, **_: Any) -> list[str]:
        return AXES[group].names() if group in AXES else list(PRESET_GROUPS[group][0])


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        leaf = getattr(value, field.name)
        if dataclasses.is_dataclass(leaf):
            yield from ((f"{field.name}.{key}", inner) for key, inner in _leaves(leaf))
        else:
            yield field.name, _plain(leaf)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        return dict(_leaves(value))
    return value
