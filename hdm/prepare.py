"""Prepare a data set, look at one, or check it.

usage: python -m hdm.prepare [data=NAME] [key=value ...] [--verify] [--repair]

  python -m hdm.prepare data=openmoji                         make it, or say that it is there
  python -m hdm.prepare data=openmoji data.side=64            a variation; it gets a folder of its own
  python -m hdm.prepare data=webdataset data.path=/my/shards  index and describe your own shards
  python -m hdm.prepare experiment=openmoji_nano              the data set of an experiment

  --verify    read everything: our shards against their SHA-256, your own sample by sample
  --repair    make missing and damaged shards again

`datasets=FOLDER` says where data sets go. An interrupted preparation goes on where it was. `python -m hdm.variants data` lists the
data sets with their fields.
"""

from typing import TYPE_CHECKING, Any

from hdm import cli

if TYPE_CHECKING:
    from pathlib import Path

    from hdm.data.shards import Shards
    from hdm.data.source import Source

_LOOKED_AT = 4096  # images per split that the aspect ratios are taken from


def command(arguments: list[str]) -> None:
    """Prepare, then print what is there."""
    verify, repair = cli.take_flag(arguments, "--verify"), cli.take_flag(arguments, "--repair")
    cli.reject_unknown([a for a in arguments if a.startswith("-")], "the flags are --verify, --repair and --help")

    from pathlib import Path

    from hdm.config.axes import DATA
    from hdm.config.compose import compose

    run = compose(arguments)
    source: Source = DATA.build(run.data)
    datasets = Path(run.datasets)
    if repair:
        source.repair(datasets)
    folder = source.prepare(datasets)
    if verify:
        source.verify(datasets)
    _describe(source, datasets, folder)
    if verify:
        print("verified")


def _describe(source: "Source", datasets: "Path", folder: "Path") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "images", "shards", "MB", "width / height: 5 %", "25 %", "50 %", "75 %", "95 %", "sha256", box=None)
    for split in ("train", "val"):
        shards = source.open(datasets, split)
        ratios = [f"{ratio:.2f}" for ratio in _aspect_ratios(shards)]
        size = sum(path.stat().st_size for path in shards.paths) / 1e6
        table.add_row(split, f"{len(shards):,}", str(len(shards.paths)), f"{size:.1f}", *ratios, shards.digest[:16])
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{source.name}[/]  {folder}")
    console.print(table)
    for key, value in source.facts().items():
        console.print(f"{key}: {value}", style="dim")


def _aspect_ratios(shards: "Shards") -> Any:
    """Percentiles 5, 25, 50, 75 and 95 of width / height, over records spread evenly."""
    import numpy as np

    from hdm.config.errors import DataError
    from hdm.data.images import measured

    ratios = []
    for i in np.unique(np.linspace(0, len(shards) - 1, _LOOKED_AT).astype(int)):
        try:
            size = measured(shards.read(int(i)).image)
        except DataError:
            continue  # counted where it matters: by the loader, and by --verify
        if size is not None:
            ratios.append(size[0] / size[1])
    return np.percentile(ratios or [np.nan], [5, 25, 50, 75, 95])


if __name__ == "__main__":
    cli.main(command, __doc__)
