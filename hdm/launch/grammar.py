"""What a sweep compares: axes with their values, from the command line and from sweeps/*.yaml.

An axis moves one key of the configuration through its values, or is a bundle: a name of its own, whose values move several keys at
once. A value may bring axes of its own along, which only the arms with that value have. In a file:

    merge: [cross, concat]                                          values
    merge: {cross: {pairing: [mirror, deepest]}, concat: {}}        a value with an axis below it
    optimizer.lr: tag(log, interval(1e-4, 1e-2))                    for search=random, tpe, cmaes, nsgaii
    bundles: {width: {64: {model.dim: 64, model.heads: 2}, 128: {model.dim: 128, model.heads: 4}}}
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hdm.config.axes import AXES, discover
from hdm.config.compose import load_plugins, split_sweep
from hdm.config.domain import Interval
from hdm.config.errors import ConfigError, suggest
from hdm.config.explain import field_types
from hdm.config.lines import REPOSITORY, quote, read_mapping
from hdm.launch.options import is_option

_EXPRESSION = re.compile(r"(choice|range|interval|glob|tag|shuffle|sort|int|float)\(.*\)$")


@dataclass(kw_only=True, slots=True)
class Choice:
    """One value of an axis, the keys that it sets, and the axes that only arms with this value have."""

    value: str
    lines: dict[str, str]
    below: "list[SweepAxis]" = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class SweepAxis:
    """What is compared: the choices of `key`, or an interval to search."""

    key: str
    choices: list[Choice] = field(default_factory=list)
    interval: Interval | None = None

    def with_(self, value: str) -> Choice:
        """The choice called `value`; for an interval any number."""
        if self.interval is not None:
            return Choice(value=value, lines={self.key: value})
        return next(choice for choice in self.choices if choice.value == value)


@dataclass(kw_only=True, slots=True)
class Point:
    """One setting: what tells it from others, and the keys that it sets."""

    label: dict[str, str]
    lines: dict[str, str]


@dataclass(kw_only=True, slots=True)
class Statement:
    """A sweep as it was said: what holds for every arm, what is compared, and the options; `file` is the NAME of sweep=NAME."""

    file: str = ""
    fixed: list[str] = field(default_factory=list)
    axes: dict[str, SweepAxis] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


def points(axes: Iterable[SweepAxis]) -> Iterator[Point]:
    """Every combination of the axes' values, those below included, the last axis varying fastest."""
    for chosen in itertools.product(*(_branches(axis) for axis in axes)):
        point = Point(label={}, lines={})
        for branch in chosen:
            point.label |= branch.label
            point.lines |= branch.lines
        yield point


def values_of(axes: Iterable[SweepAxis]) -> dict[str, list[str]]:
    """Every swept key, those below others included, with all its values; an interval is one text."""
    found: dict[str, list[str]] = {}
    for axis in axes:
        values = found.setdefault(axis.key, [])
        values += [str(axis.interval)] if axis.interval else [c.value for c in axis.choices if c.value not in values]
        for choice in axis.choices:
            for key, below in values_of(choice.below).items():
                found[key] = list(dict.fromkeys([*found.get(key, []), *below]))
    return found


def intervals(axes: Iterable[SweepAxis]) -> list[SweepAxis]:
    """The axes, at any depth, that have no list of values."""
    found = []
    for axis in axes:
        found += [axis] if axis.interval else []
        found += intervals(below for choice in axis.choices for below in choice.below)
    return found


def said(arguments: Iterable[str]) -> Statement:
    """The sweep that the command line describes; what it says itself overrules the file of sweep=NAME."""
    arguments = list(arguments)
    names = [text.partition("=")[2] for text in arguments if text.startswith("sweep=")]
    arguments = [text for text in arguments if not text.startswith("sweep=")]
    load_plugins(text for text in arguments if text.startswith("plugins="))
    statement = read_file(names[-1]) if names else Statement()
    bundles = {key: axis for key, axis in statement.axes.items() if _is_bundle(axis)}
    keys = [text for text in arguments if "=" not in text or not is_option(text.partition("=")[0])]
    fixed, swept = split_sweep(text for text in keys if text.partition("=")[0] not in bundles)
    for text in arguments:
        key, _, value = text.partition("=")
        if "=" in text and is_option(key):
            statement.options[key] = value
        elif key in bundles:
            statement.axes[key] = _narrowed(bundles[key], value.split(","))
    for key in [text.partition("=")[0] for text in fixed] + list(swept):
        statement.axes.pop(key, None)
        statement.fixed = [text for text in statement.fixed if text.partition("=")[0] != key]
    statement.fixed += fixed
    statement.axes |= {key: _axis(key, domain) for key, domain in swept.items()}
    return statement


def read_file(name: str) -> Statement:
    """The sweep that sweeps/NAME.yaml describes. Its MLflow experiment is NAME unless it says otherwise."""
    path = _find(name)
    content = read_mapping(path)
    load_plugins([f"plugins={quote(content['plugins'])}"] if "plugins" in content else [])
    discover()
    statement = Statement(file=name, fixed=[f"track.experiment={quote(name)}"])
    bundles = content.pop("bundles", {})
    try:
        for key, value in content.items():
            _take(statement, key, value)
        for key, choices in _mapping("bundles", bundles).items():
            statement.axes[key] = _bundle(key, choices)
    except ConfigError as error:
        raise ConfigError(f"{path.parent.name}/{path.name}: {error}") from None
    return statement


def _take(statement: Statement, key: str, value: object) -> None:
    """Sort one key of a file: an option, something that holds for all, an axis, or keys nested below."""
    if is_option(key):
        statement.options[key] = value
    elif isinstance(value, dict) and key in AXES and any(str(k) in AXES[key].names() for k in value):
        statement.axes[key] = _branching(key, value)
    elif isinstance(value, dict):
        for inner, leaf in value.items():
            _take(statement, f"{key}.{inner}", leaf)
    elif isinstance(value, list) and len(value) == 1:  # eval.metrics: [[fid]]
        statement.fixed.append(f"{key}={quote(value[0])}")
    elif isinstance(value, list) or _is_expression(value):
        statement.axes[key] = _values(key, value)
    else:
        statement.fixed.append(f"{key}={quote(value)}")


def _values(key: str, value: object) -> SweepAxis:
    """An axis from a list of values or from an expression in Hydra's grammar."""
    if _is_expression(value):
        text = str(value)
    elif isinstance(value, list) and value:
        text = f"choice({','.join(quote(v) for v in value)})"
    else:
        raise ConfigError(
            f"{key}: {value}: expected a list of values, such as [a, b]; a value that is a list itself is written [[a]]"
        )
    _, swept = split_sweep([f"{key}={text}"])
    return _axis(key, swept[key])


def _axis(key: str, domain: list[str] | Interval) -> SweepAxis:
    if isinstance(domain, Interval):
        return SweepAxis(key=key, interval=domain)
    return SweepAxis(key=key, choices=[Choice(value=value, lines={key: value}) for value in domain])


def _branching(key: str, content: Mapping[object, object]) -> SweepAxis:
    """`merge: {cross: {pairing: [mirror, deepest]}, concat: {}}`."""
    names = AXES[key].names()
    axis = SweepAxis(key=key)
    for value, inner in content.items():
        if str(value) not in names:
            raise ConfigError(f"{key}: {value}: no such variant{suggest(str(value), names)} (options: {', '.join(names)})")
        own = field_types(AXES[key].variants[str(value)].config)
        choice = Choice(value=str(value), lines={key: str(value)})
        for name, leaf in _mapping(f"{key}.{value}", inner).items():
            _below(choice, f"{key}.{name}" if name.partition(".")[0] in own else name, leaf)
        axis.choices.append(choice)
    return axis


def _bundle(key: str, content: object) -> SweepAxis:
    """An axis with a name of its own, each of whose values sets the keys below it."""
    axis = SweepAxis(key=key)
    for value, inner in _mapping(f"bundles.{key}", content).items():
        choice = Choice(value=value, lines={})
        for name, leaf in _mapping(f"bundles.{key}.{value}", inner).items():
            _below(choice, name, leaf)
        axis.choices.append(choice)
    if len(axis.choices) < 2:
        raise ConfigError(f"bundles.{key}: expected two values or more, each with the keys that it sets")
    return axis


def _below(choice: Choice, key: str, leaf: object) -> None:
    if isinstance(leaf, dict) and key in AXES and any(str(k) in AXES[key].names() for k in leaf):
        choice.below.append(_branching(key, leaf))
    elif isinstance(leaf, dict):
        for inner, value in leaf.items():
            _below(choice, f"{key}.{inner}", value)
    elif isinstance(leaf, list) or _is_expression(leaf):
        choice.below.append(_values(key, leaf))
    else:
        choice.lines[key] = quote(leaf)


def _branches(axis: SweepAxis) -> Iterator[Point]:
    for choice in axis.choices:
        for below in points(choice.below):
            yield Point(label={axis.key: choice.value} | below.label, lines=choice.lines | below.lines)


def _is_bundle(axis: SweepAxis) -> bool:
    return any(axis.key not in choice.lines for choice in axis.choices)


def _narrowed(axis: SweepAxis, values: list[str]) -> SweepAxis:
    known = {choice.value: choice for choice in axis.choices}
    for value in values:
        if value not in known:
            raise ConfigError(f"{axis.key}={value}: no such value{suggest(value, known)} (options: {', '.join(known)})")
    return SweepAxis(key=axis.key, choices=[known[value] for value in values])


def _mapping(key: str, value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {value}: expected a mapping of key: value")
    return {str(k): v for k, v in value.items()}


def _is_expression(value: object) -> bool:
    return isinstance(value, str) and _EXPRESSION.match(value) is not None


def sweep_files() -> dict[str, Path]:
    """The files that sweep=NAME may name, from ./sweeps and the repository."""
    folders = (REPOSITORY / "sweeps", Path.cwd() / "sweeps")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _find(name: str) -> Path:
    known = sweep_files()
    if name not in known:
        raise ConfigError(
            f"sweep={name}: no such file sweeps/{name}.yaml{suggest(name, known)} (options: {', '.join(known) or 'none'})"
        )
    return known[name]
