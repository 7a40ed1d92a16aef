"""Prepare a data set, look at one, or check it.

usage: python -m hdm.prepare [data=NAME] [key=value ...] [workers=N] [--verify] [--repair] [--again] [--index]

  python -m hdm.prepare data=openmoji                         make it, or say that it is there
  python -m hdm.prepare data=openmoji data.side=64            a variation; it gets a folder of its own
  python -m hdm.prepare data=folder data.path=/my/pictures    pack pictures with captions in .txt into shards
  python -m hdm.prepare data=webdataset data.path=/my/shards  index and describe your own shards
  python -m hdm.prepare experiment=openmoji_nano              the data set of an experiment

  --verify    read everything: our shards against their SHA-256, your own sample by sample
  --repair    make missing and damaged shards again
  --again     look at the files of data=folder, danbooru or parquet again: what was added, changed or removed since
  --index     put the index beside shards that others will read from an address
  workers=N   processes that make shards; as many as there are cores when left out

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
    again, index = cli.take_flag(arguments, "--again"), cli.take_flag(arguments, "--index")
    workers = _workers(cli.take_option(arguments, "workers"))
    cli.reject_unknown([a for a in arguments if a.startswith("-")], "the flags are --verify, --repair, --again, --index and --help")

    from pathlib import Path

    from hdm.config.axes import DATA
    from hdm.config.compose import compose

    run = compose(arguments)
    source: Source = DATA.build(run.data)
    datasets = Path(run.datasets)
    if workers is not None:
        source.workers = workers
    if repair:
        source.repair(datasets)
    folder = source.again(datasets) if again else source.prepare(datasets)
    if index:
        for split in ("train", "val"):
            source.open(datasets, split).write_sidecars()
    if verify:
        source.verify(datasets)
    _describe(source, datasets, folder)
    if verify:
        print("verified")


def _workers(text: str | None) -> int | None:
    from hdm.config.errors import ConfigError

    if text is not None and not (text.isdecimal() and 0 < int(text) <= 1024):
        raise ConfigError(f"workers={text}: must be a number from 1 to 1024")
    return None if text is None else int(text)


def _describe(source: "Source", datasets: "Path", folder: "Path") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "images", "shards", "MB", "width / height: 5 %", "25 %", "50 %", "75 %", "95 %", "sha256", box=None)
    for split in ("train", "val"):
        shards = source.open(datasets, split)
        ratios = [f"{ratio:.2f}" for ratio in _aspect_ratios(shards)]
        size = shards.total_bytes / 1e6
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
