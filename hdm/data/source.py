"""A source brings captioned images as shards: it prepares them once, then opens a split of them.

`PreparedSource` is for sources that make their own shards: a folder whose name holds a digest of the settings, shards that appear
under their final name only when complete, and a manifest, written last, with the digest of every shard. A preparation that is
killed goes on at the shard where it was; a second process waits for the first.
"""

import dataclasses
import hashlib
import json
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdm.cli import progress
from hdm.config.axes import DATA
from hdm.config.errors import DataError
from hdm.config.schema import RunConfig
from hdm.data.shards import Record, Shard, Shards, write_shard
from hdm.files import locked, sha256, write_json

SPLITS = ("train", "val")
MANIFEST = "manifest.json"


class Source(ABC):
    """A data set."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.workers = len(os.sched_getaffinity(0))  # processes that make shards, where that can be shared out

    @abstractmethod
    def prepare(self, datasets: Path) -> Path:
        """Make the data set below `datasets` and return its folder. One that is there is left alone, half of one is completed."""

    @abstractmethod
    def open(self, datasets: Path, split: str) -> Shards:
        """The samples of "train" or "val"; prepares them when needed. Raises DataError for a missing or damaged shard."""

    @abstractmethod
    def verify(self, datasets: Path) -> None:
        """Read everything and compare it with what is known of it. Raises DataError for what is damaged."""

    @abstractmethod
    def repair(self, datasets: Path) -> None:
        """Make damaged shards again."""

    def again(self, datasets: Path) -> Path:
        """Look at what the data set was made of again, and bring it up to date; where nothing can have changed, as `prepare`."""
        return self.prepare(datasets)

    def facts(self) -> dict[str, Any]:
        """What a person should know of it: licence, versions."""
        return {}

    @property
    def name(self) -> str:
        """The variant's name."""
        return DATA.of(self.config).name

    def command(self, datasets: Path, *flags: str) -> str:
        """The command line that prepares this data set below `datasets`."""
        default = type(self.config)()
        fields = [field.name for field in dataclasses.fields(self.config)]
        changed = [
            shlex.quote(f"data.{f}={getattr(self.config, f)}") for f in fields if getattr(self.config, f) != getattr(default, f)
        ]
        place = [] if str(datasets) == RunConfig().datasets else [f"datasets={datasets}"]
        return " ".join(["python -m hdm.prepare", f"data={self.name}", *changed, *place, *flags])


class PreparedSource(Source):
    """A source that makes its shards. The subclass says what they hold."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the bytes depend on; their digest is part of the folder's name."""

    @abstractmethod
    def plan(self) -> dict[str, list[Any]]:
        """Shard name -> its items, in a fixed order. Names begin with the split: `train-000000.tar`."""

    @abstractmethod
    def make(self, item: Any) -> Record:
        """The sample of one item."""

    def folder(self, datasets: Path) -> Path:
        """Where the data set lies below `datasets`."""
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=4).hexdigest()
        return datasets / f"{self.name}-{digest}"

    def prepare(self, datasets: Path) -> Path:
        """See `Source.prepare`."""
        folder = self.folder(datasets)
        if not (folder / MANIFEST).exists():
            with _locked(folder):
                if not (folder / MANIFEST).exists():
                    self._write(folder)
        return folder

    def open(self, datasets: Path, split: str) -> Shards:
        """See `Source.open`."""
        folder = self.prepare(datasets)
        return self._shards(folder, read_manifest(folder)["splits"][split]["shards"])

    def verify(self, datasets: Path) -> None:
        """See `Source.verify`."""
        folder = self.prepare(datasets)
        damaged = list(_damaged(folder))
        if damaged:
            raise DataError(f"{folder}: {', '.join(damaged)} missing or damaged; {self.command(datasets, '--repair')}")

    def repair(self, datasets: Path) -> None:
        """See `Source.repair`."""
        folder = self.prepare(datasets)
        with _locked(folder):
            for name in _damaged(folder):
                (folder / name).unlink(missing_ok=True)
                (folder / MANIFEST).unlink(missing_ok=True)
            if not (folder / MANIFEST).exists():
                self._write(folder)

    def _shards(self, folder: Path, entries: Iterable[Mapping[str, Any]]) -> Shards:
        shards = [Shard(folder / entry["file"], entry["bytes"], entry["sha256"]) for entry in entries]
        return Shards(shards, name=folder.name, index_folder=folder / "index", remedy=self.command(folder.parent, "--repair"))

    def _write(self, folder: Path) -> None:
        """Make the shards that are not there, then the manifest."""
        plan = self.plan()
        with progress(f"Preparing {folder}", sum(len(items) for items in plan.values()), "images") as advance:
            for name, items in plan.items():
                if (folder / name).exists():
                    advance(len(items))
                else:
                    write_shard(folder / name, self._records(items, advance))
        splits = {split: summary(folder, {n: len(i) for n, i in plan.items() if n.startswith(split)}) for split in SPLITS}
        digest = hashlib.sha256("".join(s["sha256"] for split in splits.values() for s in split["shards"]).encode()).hexdigest()
        manifest = {"name": self.name, **self.facts(), "settings": self.settings(), "digest": digest, "splits": splits}
        write_json(folder / MANIFEST, manifest)

    def _records(self, items: list[Any], advance: Any) -> Iterator[Record]:
        for item in items:
            yield self.make(item)
            advance(1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises DataError when it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [entry for split in SPLITS for entry in content["splits"][split]["shards"]]
        if not all({"file", "bytes", "sha256"} <= set(entry) for entry in entries):
            raise ValueError("a shard is described in part")
        return content
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder / MANIFEST}: cannot be read ({reason}); delete it and prepare again") from None


def _damaged(folder: Path) -> Iterator[str]:
    """The shards of a prepared folder that are missing or differ from its manifest."""
    for split in read_manifest(folder)["splits"].values():
        for entry in split["shards"]:
            path = folder / entry["file"]
            if not path.exists() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                yield entry["file"]


def summary(folder: Path, images: Mapping[str, int]) -> dict[str, Any]:
    """What the manifest says of a split whose shards hold so many images each."""
    shards = [
        {"file": name, "images": count, "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name, count in images.items()
    ]
    return {"images": sum(images.values()), "shards": shards}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; what cannot be written meanwhile is one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", waiting=f"waiting for another process that prepares {folder}"):
            yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; make room or choose another place with"
            " datasets=FOLDER, then give the same command again"
        ) from None
