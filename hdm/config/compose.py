"""From the command line and YAML to a typed `RunConfig`: the only file that knows hydra and omegaconf.

Experiments and presets expand to lines `key=value` (`hdm.config.lines`); the command line's come last and win. A backbone may imply
lines on other axes, which any line of the source that chose it overrules. Hydra reads their values and composes them over the typed
schema. The reverse, `flatten`, writes a whole configuration as such lines; it is what runs, checkpoints and MLflow parameters
store.
"""

import dataclasses
import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm.config.axes import AXES, discover
from hdm.config.check import check
from hdm.config.errors import ConfigError
from hdm.config.explain import check_key, expected
from hdm.config.lines import Line, expand, files, imply, quote, settle
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
    config = _hydra(final)
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


def split_sweep(overrides: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate fixed overrides from swept keys with their values.

    Hydra's grammar: choices `a,b` or `choice(a,b)`, `range(1,4)`, `glob(*)` over the variants of an axis.
    """
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for text in overrides:
        override = _hydra_parse(text)
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(text)
        elif not override.is_discrete_sweep():
            raise ConfigError(f"{text}: an interval has no list of values; write choices (a,b,c) or range(start,stop,step)")
        else:
            discover()
            values = [str(v) for v in override.sweep_string_iterator()]
            if len(set(values)) < len(values):
                raise ConfigError(f"{text}: a value stands twice; name each once")
            swept[key] = values
    return fixed, swept


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


def _hydra(lines: list[Line]) -> RunConfig:
    store = ConfigStore.instance()
    for axis in AXES.values():
        for variant in axis.variants.values():
            store.store(group=axis.name, name=variant.name, node=variant.config)
    for group, (presets, _) in PRESET_GROUPS.items():
        for name, value in presets.items():
            store.store(group=group, name=name, node=value)
    defaults: list[Any] = ["_self_", *({axis.name: axis.default} for axis in AXES.values())]
    defaults += [{group: default} for group, (_, default) in PRESET_GROUPS.items()]
    store.store(name="run", node=_root_type(defaults))
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base="1.3", config_path=None):
            composed = hydra_compose(config_name="run", overrides=[f"{line.key}={line.value}" for line in lines])
        values: dict[str, Any] = {f.name: composed[f.name] for f in dataclasses.fields(RunConfig)}
        values = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in values.items()}
    except (HydraException, OmegaConfBaseException) as error:
        raise _translated(error, lines) from None
    return with_origin(RunConfig(**values))


def _root_type(defaults: list[Any]) -> type:
    """RunConfig with Hydra's defaults list, which has no business in the schema itself."""
    field = ("defaults", list[Any], dataclasses.field(default_factory=lambda: defaults))
    return dataclasses.make_dataclass("Root", [field], bases=(RunConfig,), kw_only=True)


def _translated(error: Exception, lines: list[Line]) -> ConfigError:
    """One line with the key, the value and what would be right, from hydra's or omegaconf's message."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ConfigError):
            return cause
    text = "\n".join(str(cause) for cause in causes)
    match = re.search(r"full_key: (\S+)", text)
    key = match.group(1) if match else ""
    line = next((line for line in lines if line.key == key), None) or next(
        (line for line in lines if key and key.startswith(line.key)), None
    )
    reasons = [words.splitlines()[0] for cause in causes if (words := str(cause).strip())]  # some have none
    if line is not None:
        return ConfigError(f"{line}: {expected(key, lines, reasons[-1])}")
    match = re.search(r"override '?([\w.]+)", text)  # inside an item of a list the full key is only the item's
    line = next((line for line in lines if match and line.key == match.group(1)), None)
    return ConfigError(f"{line}: {reasons[1]}; {expected(line.key, lines, reasons[-1])}" if line else reasons[0])


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
