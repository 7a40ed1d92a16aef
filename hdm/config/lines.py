"""Overrides as lines: experiments and presets expanded in place, later lines winning.

An experiment (`experiments/NAME.yaml`) and a preset (`hdm/config/presets/NAME.yaml`) are the command line kept in a file: a mapping
whose keys are what one would type left of `=`, dotted or nested; `base: NAME` includes another experiment.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from hdm.config.axes import AXES
from hdm.config.errors import ConfigError, suggest
from hdm.config.schema import PRESET_GROUPS
from hdm.config.traits import declared

REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDERS = {"experiment": "experiments", "preset": "hdm/config/presets"}


@dataclass(slots=True)
class Line:
    """One override: `key=value`, the value in Hydra's grammar, and the file that it came from.

    `implied` names the choice, such as backbone=dit, that brought the line along; its source is that of the choice.
    """

    key: str
    value: str
    source: str = "command line"
    implied: str = ""

    def __str__(self) -> str:
        where = f"implied by {self.implied}" if self.implied else self.source
        return f"{self.key}={self.value}" + ("" if where == "command line" else f" ({where})")


def expand(lines: Iterable[Line], seen: tuple[str, ...] = ()) -> Iterator[Line]:
    """The lines with every experiment and preset replaced by what its file says; of the experiments the outermost name stays."""
    for line in lines:
        if line.key not in _FOLDERS:
            yield line
            continue
        name = line.value.strip("'\"")
        if line.key == "experiment":
            yield Line("experiment", name, line.source)
            if name == "none":
                continue
        known = files(line.key)
        if name not in known:
            raise ConfigError(f"{line}: no such {line.key}{suggest(name, known)} (options: {', '.join(sorted(known))})")
        if name in seen:
            raise ConfigError(f"{known[name]}: includes itself by way of {' -> '.join((*seen, name))}; break the circle")
        yield from (inner for inner in expand(_read(known[name]), (*seen, name)) if inner.key != "experiment")


def files(kind: str) -> dict[str, Path]:
    """The files of all experiments or presets by name; experiments also from ./experiments, which win."""
    folders = [REPOSITORY / _FOLDERS[kind]] + ([Path.cwd() / _FOLDERS[kind]] if kind == "experiment" else [])
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's plain scalars: `off` and `no` are words, 1e-3 is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


for _tag, _pattern in {
    "bool": r"true|false",
    "null": r"null|~|",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def read_mapping(path: Path) -> dict[str, object]:
    """The keys and values of a YAML file. Raises ConfigError for one that is not readable or holds something else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Yaml) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; it should be a mapping of key: value")
    return {str(key): value for key, value in content.items()}


def _read(path: Path) -> list[Line]:
    """The lines of an experiment or preset file."""
    label = f"{path.parent.name}/{path.name}"
    lines = []
    for key, value in read_mapping(path).items():
        if key == "base":
            lines.append(Line("experiment", str(value), label))
        else:
            lines.extend(Line(k, quote(v), label) for k, v in _nested(key, value))
    return lines


def _nested(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for inner, leaf in value.items():
            yield from _nested(f"{key}.{inner}", leaf)
    else:
        yield key, value


def imply(lines: list[Line]) -> list[Line]:
    """`lines` with what the backbone and adapters imply for other keys."""
    return _unrouted(_published(lines))


def _unrouted(lines: list[Line]) -> list[Line]:
    """`lines` with routing.rate=0 behind the choice of adapters (spec 1.3 i), as if its source said so if it says nothing else."""
    place = max((i for i, line in enumerate(lines) if line.key == "lora.rank"), default=-1)
    if place < 0 or lines[place].value == "0":
        return lines
    routing, rank = choice("routing", lines), lines[place]
    if any(line.source == rank.source and line.key in ("routing", "routing.rate") for line in lines):
        return lines
    if routing not in AXES["routing"].names() or "rate" not in AXES["routing"].get(routing).config.__dataclass_fields__:
        return lines
    return [*lines[: place + 1], Line("routing.rate", "0.0", rank.source, str(rank)), *lines[place + 1 :]]


def _published(lines: list[Line]) -> list[Line]:
    """`lines` with what the chosen backbone's published form implies for other axes (`implies` of its config).

    Implied lines stand where the backbone was chosen: above earlier sources, below every line of the source that chose it, wherever
    on the command line or in the file that line is. To choose the same backbone again, in a later source, implies nothing new.
    """
    name = choice("backbone", lines)
    if name not in AXES["backbone"].names():
        return lines
    place = -1  # the choice that the later ones only repeat; -1 is the default's
    for i, line in enumerate(lines):
        if line.key == "backbone":
            place = i if place < 0 or lines[place].value != line.value else place
    source = lines[place].source if place >= 0 else "default"
    said = {line.key: line.value for line in lines if line.source == source}
    implies = declared(AXES["backbone"].get(name).config, "implies")

    def stands(key: str) -> bool:
        """No line of the source says otherwise, nor chooses a variant that the field is not meant for."""
        axis = key.partition(".")[0]
        return key not in said and (axis not in AXES or axis not in said or said[axis] == implies.get(axis))

    implied = [Line(key, value, source, f"backbone={name}") for key, value in implies.items() if stands(key)]
    return [*lines[: place + 1], *implied, *lines[place + 1 :]]


def settle(lines: list[Line]) -> list[Line]:
    """One line a key, groups first. Later lines win; choosing another variant drops the fields that other sources set before.

    Fields that all variants of an axis have in common stay: `crop=arb` behind an experiment of 32 pixels has 32 pixels.
    Within one source the order does not matter: `data.path=/shards data=webdataset` says the same as the other way round.
    """
    final: dict[str, Line] = {}
    for line in lines:
        if is_group(line.key) and line.value != choice(line.key, final.values()):
            common = {f"{line.key}.{field}" for field in AXES[line.key].common} if line.key in AXES else set()
            for key in [k for k in final if k.startswith(line.key + ".") and final[k].source != line.source]:
                if key not in common:
                    del final[key]
        final[line.key] = line
    return sorted(final.values(), key=lambda line: "." in line.key)


def is_group(key: str) -> bool:
    """Whether `key` names an axis or a group of presets."""
    return key in AXES or key in PRESET_GROUPS


def choice(group: str, lines: Iterable[Line]) -> str:
    """The variant or preset of `group` that `lines` choose."""
    chosen = [line.value for line in lines if line.key == group]
    return chosen[-1] if chosen else AXES[group].default if group in AXES else PRESET_GROUPS[group][1]


_BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_][\w./-]*", re.ASCII | re.IGNORECASE)


def quote(value: object) -> str:
    """`value` as one would type it right of `=`; names and paths stay bare."""
    match value:
        case Enum():
            return value.name
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ",".join(quote(v) for v in value) + "]"
        case dict():
            return "{" + ",".join(f"{k}:{quote(v)}" for k, v in value.items()) + "}"
    if _BARE.fullmatch(str(value)):
        return str(value)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"
