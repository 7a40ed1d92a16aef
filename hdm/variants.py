"""List what can be ablated.

usage: python -m hdm.variants [AXIS|EXPERIMENT-KEY ...] [--names] [--counts | --refused | --markdown | --readme | --write | --check]
                              [plugins=[my_lab.merges]]

  python -m hdm.variants                every axis with its variants
  python -m hdm.variants merge          the variants of one axis: fields, defaults, meaning, which experiments use them
  python -m hdm.variants merge --names  one bare name a line, for scripts
  python -m hdm.variants experiments    the experiments and what each sets
  python -m hdm.variants keys           every other key of the configuration, with defaults
  python -m hdm.variants --counts       how many variants there are, how many pairs go together and how many are refused, by axis
  python -m hdm.variants --refused      every pair of variants that is refused, why, and what to use instead
  python -m hdm.variants --markdown     all of it as one page, with parameters and FLOPs of every variant at model=base
  python -m hdm.variants --readme       the table of axes as it stands in README.md
  python -m hdm.variants --write        write docs/variants.md, and the table into README.md where that marks a place for it
  python -m hdm.variants --check        fail when these files are not what the registry says
"""

import dataclasses
import textwrap
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.registry import Axis

if TYPE_CHECKING:
    from rich.console import Console

_WIDEST = 40  # characters of the column of keys


def command(arguments: list[str]) -> None:
    """Print the listing that `arguments` ask for."""
    from hdm.config import compose
    from hdm.config.axes import discover
    from hdm.config.errors import ConfigError, suggest

    names_only = cli.take_flag(arguments, "--names")
    asked = [
        page for page in ("--counts", "--refused", "--markdown", "--readme", "--write", "--check") if cli.take_flag(arguments, page)
    ]
    plugins = [a for a in arguments if a.startswith("plugins=")]
    topics = [a for a in arguments if a not in plugins]
    compose.load_plugins(plugins)
    axes = discover()
    if asked:
        _generated(asked)
        return
    pages = {"experiments": _experiments, "keys": _keys}
    for topic in topics:
        if topic not in axes and topic not in pages:
            raise ConfigError(
                f"{topic}: no such axis{suggest(topic, [*axes, *pages])} (axes: {', '.join(axes)}; also: experiments, keys)"
            )
    if names_only:
        listed = [compose.experiment_names() if t == "experiments" else axes[t].names() for t in topics if t != "keys"]
        print("\n".join(name for names in (listed if topics else [list(axes)]) for name in names))
        return
    if not topics:
        _overview(axes)
    for topic in topics:
        if topic in pages:
            pages[topic]()
        else:
            _axis(axes[topic])


def _generated(asked: list[str]) -> None:
    """What is made from the whole registry."""
    from hdm import catalogue

    tables = {"--counts": catalogue.counts_table, "--refused": catalogue.refused_table}
    for text, make in {**tables, "--markdown": catalogue.page, "--readme": catalogue.overview}.items():
        if text in asked:
            print(make(), end="")
    if "--write" in asked:
        for path in catalogue.write():
            print(f"wrote {path}")
    if "--check" in asked:
        catalogue.check()


def _overview(axes: dict[str, Axis[Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("axis", "variants (default first)", "what it is"):
        table.add_column(heading, overflow="fold")
    for axis in axes.values():
        names = [axis.default, *(name for name in axis.names() if name != axis.default)]
        table.add_row(f"[bold]{axis.name}", ", ".join(names), axis.doc)
    _console().print(table)
    print("python -m hdm.variants AXIS shows fields and defaults.\nChoose with AXIS=NAME, set a field with AXIS.FIELD=VALUE.")


def _axis(axis: Axis[Any]) -> None:
    from hdm import catalogue
    from hdm.config.compose import experiment_lines, experiment_names

    users = {name: experiment_lines(name, implied=True).get(axis.name, axis.default) for name in experiment_names()}
    console = _console()
    console.print(f"[bold]{axis.name}[/]: {axis.doc}\n")
    for variant in axis.variants.values():
        default = "  (default)" if variant.name == axis.default else ""
        console.print(f"[bold]{axis.name}={variant.name}[/]{default}")
        _paragraph(variant.doc)
        _print_fields(_fields(variant.config, prefix=f"{axis.name}."))
        for line in catalogue.relations(variant):
            _paragraph(line.replace("`", ""))
        used = [name for name, choice in users.items() if choice == variant.name]
        _paragraph(f"in {variant.module}; experiments: {', '.join(used) or 'none'}", style="dim")
        console.print()


def _experiments() -> None:
    from hdm.config.compose import experiment_lines, experiment_names, experiment_note

    for name in experiment_names():
        _console().print(f"[bold]experiment={name}")
        _paragraph(experiment_note(name), style="dim")
        for key, value in experiment_lines(name).items():
            if key != "experiment":
                shown = value.replace("[{", "[\n    {").replace("},{", "},\n    {")
                print(f"  {key}={shown}")  # as it may be copied: never wrapped
        print()


def _keys() -> None:
    from hdm.config.axes import AXES
    from hdm.config.schema import PRESET_GROUPS, RunConfig, StageConfig

    run = RunConfig()
    groups = {f.name: type(getattr(run, f.name)) for f in dataclasses.fields(run) if dataclasses.is_dataclass(getattr(run, f.name))}
    console = _console()
    single = [f for f in dataclasses.fields(run) if f.name not in AXES and f.name not in groups and f.name != "stages"]
    tables = {"": [_row(f) for f in single]}
    for name, kind in groups.items():
        presets = f"; {name}={'|'.join(PRESET_GROUPS[name][0])} sets all of them" if name in PRESET_GROUPS else ""
        tables[f"[bold]{name}[/]: {_help(RunConfig, name)}{presets}"] = _fields(kind, prefix=f"{name}.")
    stages = r"[bold]stages[/]=\[{FIELD:VALUE, …}, …]: " + _help(RunConfig, "stages")
    tables[stages] = _fields(StageConfig)
    width = max(len(shown) for rows in tables.values() for shown, _ in rows)
    for title, rows in tables.items():
        if title:
            console.print(f"\n{title}")
        _print_fields(rows, width=width)


def _fields(config: type, prefix: str = "") -> list[tuple[str, str]]:
    """Of every field of a config dataclass: `key=default`, as one would type it, and its help."""
    return [_row(field, prefix) for field in dataclasses.fields(config)]


def _row(field: "dataclasses.Field[Any]", prefix: str = "") -> tuple[str, str]:
    from hdm.config.lines import quote

    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"{prefix}{field.name}={quote(made)}", field.metadata.get("help", "")


def _help(config: type, name: str) -> str:
    return str(next(f for f in dataclasses.fields(config) if f.name == name).metadata["help"])


def _print_fields(rows: list[tuple[str, str]], width: int = 0) -> None:
    """Two columns; a key that is too long for the first has a line of its own."""
    width = width or max((len(shown) for shown, _ in rows), default=0)
    width = min(width, _WIDEST)
    room = max(_console().width - width - 4, 20)
    for shown, text in rows:
        first, *others = [*([""] if len(shown) > width else []), *textwrap.wrap(text, room)]
        print(f"  {shown:<{width}}  {first}".rstrip())
        for line in others:
            print(" " * (width + 4) + line)


def _paragraph(text: str, style: str = "") -> None:
    """Indented by two, on every line."""
    from rich.padding import Padding
    from rich.text import Text

    _console().print(Padding(Text(text, style=style), (0, 0, 0, 2)))


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


if __name__ == "__main__":
    cli.main(command, __doc__)
