"""Tensors on the disk, each found by a digest of what it was made of.

    NAME-DIGEST/
      part-000000.safetensors   keys (n, 16), the tensors of n entries, their statistics in the header
      index.json                the settings, the statistics, size and SHA-256 of every part; written last

The folder's name holds a digest of the settings that the entries depend on. A part appears under its name when it is complete, so a
fill that is killed goes on at the part where it was, and several processes share the parts out among themselves.
"""

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdm.config.errors import DataError, HdmError
from hdm.files import locked, replacing, sha256, write_json

FORMAT = 1
INDEX = "index.json"
_OPEN = 64  # parts held open
_WAIT = 1.0  # seconds between two looks at parts that others are making


@dataclass(kw_only=True, slots=True)
class Sums:
    """What means and standard deviations are made of, by channel, in float64."""

    count: int = 0
    total: Any = 0.0
    square: Any = 0.0

    @classmethod
    def of(cls, values: Tensor, *, variance: Tensor | None = None) -> "Sums":
        """Of `values` (n, channels), each with a `variance` of its own where it is the mean of a distribution."""
        x = values.double()
        square = x.square() if variance is None else x.square() + variance.double()
        return cls(count=len(x), total=x.sum(0).cpu().numpy(), square=square.sum(0).cpu().numpy())

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(count=self.count + other.count, total=self.total + other.total, square=self.square + other.square)

    def summary(self) -> dict[str, Any]:
        """Count, mean and standard deviation."""
        mean = np.atleast_1d(self.total) / max(self.count, 1)
        variance = np.atleast_1d(self.square) / max(self.count, 1) - mean**2
        return {"count": self.count, "mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}


@dataclass(kw_only=True, slots=True)
class Part:
    """The entries of one part: tensors with n rows, or, with `ends`, of which entry i holds rows ends[i-1] to ends[i]."""

    keys: list[bytes]
    tensors: dict[str, Tensor]
    ends: list[int] | None = None
    sums: Sums = field(default_factory=Sums)


def key(*contents: bytes) -> bytes:
    """16 bytes that stand for `contents`."""
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(content)
    return digest.digest()


@dataclass(kw_only=True, slots=True)
class Place:
    """Where a store is, or would be: below `root`. `axis` names the option in messages, `settings` what entries depend on."""

    axis: str
    root: Path
    name: str
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the store with these settings."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=4).hexdigest()
        return self.root / f"{self.name}-{digest}"

    @property
    def remedy(self) -> str:
        """What to do where there is none."""
        return f"fill one with the words of this run, python -m hdm.cache …, or set {self.axis}.cache=none"

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:06d}.safetensors"


# --- fill -------------------------------------------------------------------------------------------------------------


def fill(place: Place, count: int, make: Callable[[int], Part], *, done: Callable[[int], None]) -> dict[str, Any]:
    """Make the parts 0 … `count` - 1 that are not there, then the index, which is returned. `done(part)` is told of each."""
    place.folder.mkdir(parents=True, exist_ok=True)
    missing = list(range(count))
    while missing:
        busy = [number for number in missing if not _made(place, number, make)]
        for number in missing:
            if number not in busy:
                done(number)
        if len(busy) == len(missing):
            time.sleep(_WAIT)  # all that is left is being made by others
        missing = busy
    with locked(place.folder / ".lock"):
        if (index := _read_index(place.folder)) is None:
            index = _index(place, count)
            write_json(place.folder / INDEX, index)
            for lock in place.folder.glob("part-*.lock"):
                lock.unlink(missing_ok=True)
    return index


def _made(place: Place, number: int, make: Callable[[int], Part]) -> bool:
    """Whether part `number` is there, made now if nobody else is at it."""
    path = place.part(number)
    if path.exists():
        return True
    try:
        with locked(path.with_suffix(".lock"), busy="busy"):
            if not path.exists():
                _write(path, make(number))
    except HdmError as error:
        if str(error) != "busy":
            raise
        return False
    return True


def _write(path: Path, part: Part) -> None:
    keys = torch.from_numpy(np.frombuffer(b"".join(part.keys), np.uint8).reshape(-1, 16).copy())
    tensors = {"keys": keys, **{name: tensor.contiguous().cpu() for name, tensor in part.tensors.items()}}
    if part.ends is not None:
        tensors["ends"] = torch.tensor(part.ends, dtype=torch.int64)
    sums = {
        "count": part.sums.count,
        "total": np.asarray(part.sums.total).tolist(),
        "square": np.asarray(part.sums.square).tolist(),
    }
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata={"sums": json.dumps(sums)})
        except Exception as error:  # SafetensorError for a full disk, which has no errno
            raise DataError(f"{path}: cannot be written: {' '.join(str(error).split())}; make room or set cache=FOLDER") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())


def _index(place: Place, count: int) -> dict[str, Any]:
    sums, entries, parts = Sums(), 0, []
    for number in range(count):
        path = place.part(number)
        with safe_open(path, framework="pt") as file:
            read = json.loads(file.metadata()["sums"])
            entries += (own := file.get_slice("keys").get_shape()[0])
        sums += Sums(count=read["count"], total=np.asarray(read["total"]), square=np.asarray(read["square"]))
        parts.append({"file": path.name, "entries": own, "bytes": path.stat().st_size, "sha256": sha256(path)})
    return {"format": FORMAT, "settings": place.settings, "entries": entries, "statistics": sums.summary(), "parts": parts}


# --- read -------------------------------------------------------------------------------------------------------------


class Store:
    """A complete store, opened for reading."""

    def __init__(self, place: Place) -> None:
        """Raises DataError where there is none for these settings, naming what the nearest differs in, or where it is damaged."""
        self.place = place
        self.index = _fitting(place)
        self.paths = [place.folder / part["file"] for part in self.index["parts"]]
        for path, part in zip(self.paths, self.index["parts"]):
            if not path.exists() or path.stat().st_size != part["bytes"]:
                raise DataError(f"{path}: is missing or damaged; remove {place.folder} and {place.remedy}")
        self._files: OrderedDict[int, Any] = OrderedDict()
        keys = [self._file(number).get_tensor("keys").numpy() for number in range(len(self.paths))]
        self._starts = np.cumsum([0, *map(len, keys)])
        # Trailing zero bytes are cut off in this type, on both sides of every comparison.
        self._keys = np.concatenate(keys).reshape(-1).view("S16") if len(keys) else np.empty(0, "S16")
        self._order = np.argsort(self._keys, kind="stable")
        self._sorted = self._keys[self._order]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # open files stay in their process

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """The entry of each key; None where there is none."""
        wanted = np.frombuffer(b"".join(keys), "S16")
        places = np.minimum(np.searchsorted(self._sorted, wanted), max(len(self._sorted) - 1, 0))
        hits = self._sorted[places] == wanted if len(self._sorted) else np.zeros(len(wanted), bool)
        return [int(self._order[place]) if hit else None for place, hit in zip(places, hits)]

    def read(self, entry: int) -> dict[str, Tensor]:
        """The tensors of an entry, as they are stored."""
        number = int(np.searchsorted(self._starts, entry, side="right")) - 1
        file, row = self._file(number), entry - int(self._starts[number])
        names = [name for name in file.keys() if name not in ("keys", "ends")]  # noqa: SIM118 - not a dict
        if "ends" not in file.keys():  # noqa: SIM118
            return {name: file.get_slice(name)[row] for name in names}
        ends = file.get_slice("ends")
        start, end = int(ends[row - 1]) if row else 0, int(ends[row])
        return {name: file.get_slice(name)[start:end] for name in names}

    def verify(self) -> None:
        """Read everything. Raises DataError for a part that is not what it was."""
        for path, part in zip(self.paths, self.index["parts"]):
            if sha256(path) != part["sha256"]:
                raise DataError(f"{path}: is damaged, its SHA-256 is not that of the index; remove it and {INDEX}, and fill again")

    def _file(self, number: int) -> Any:
        if number not in self._files:
            try:
                self._files[number] = safe_open(self.paths[number], framework="pt").__enter__()  # type: ignore[no-untyped-call]
            except Exception as error:  # OSError or SafetensorError
                reason = " ".join(str(error).split())
                raise DataError(f"{self.paths[number]}: cannot be read: {reason}; {self.place.remedy}") from None
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(number)
        return self._files[number]


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{folder / INDEX}: is no JSON; remove {folder} and fill it again") from None
    return index


def _fitting(place: Place) -> dict[str, Any]:
    """The index of the store at `place`. Raises DataError."""
    index = _read_index(place.folder)
    if index is None:
        raise DataError(f"{place.axis}.cache: {_missing(place)}; {place.remedy}")
    if index.get("format") != FORMAT:
        raise DataError(f"{place.folder}: has format {index.get('format')}, {FORMAT} is read here; {place.remedy}")
    if differing := differences(index["settings"], place.settings):
        raise DataError(f"{place.axis}.cache: {place.folder} was made for another run: {differing[0]}; {place.remedy}")
    return index


def _missing(place: Place) -> str:
    if parts := len(list(place.folder.glob("part-*.safetensors"))):
        return f"{place.folder} is not complete, {parts} parts are there"
    others = {folder: _read_index(folder) for folder in sorted(place.root.glob("*-*")) if folder.is_dir()}
    found = {folder: differences(index["settings"], place.settings) for folder, index in others.items() if index is not None}
    if not found:
        return f"there is none in {place.root}"
    nearest = min(found, key=lambda folder: len(found[folder]))
    return f"{place.root} holds none for this run; the nearest, {nearest.name}, differs in {', '.join(found[nearest])}"


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What `stored` settings say otherwise than `wanted` ones, field by field."""
    names = [*wanted, *(name for name in stored if name not in wanted)]
    absent = "nothing"
    return [
        f"{name} ({stored.get(name, absent)} there, {wanted.get(name, absent)} here)"
        for name in names
        if stored.get(name, absent) != wanted.get(name, absent)
    ]
