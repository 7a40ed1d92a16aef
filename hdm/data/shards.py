"""Webdataset shards, read by number instead of as a stream.

A shard is a tar; a sample is a run of members that share a name up to the first dot: `000042.png` and `000042.txt`. An index of
each tar (where each sample's image and caption lie) is made once and kept in `index_folder`; reading sample i is then two `pread`s.
That makes the order of a run a matter of arithmetic (`hdm.data.order`), and a resumed run starts at once, wherever it was.
Crops that depend on the images' sizes ask for `Shards.sizes`: every header is read once and kept beside the index.
"""

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm.cli import progress
from hdm.config.errors import DataError
from hdm.data.images import measured
from hdm.files import sha256

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
CAPTION = ".txt"
_OPEN_FILES = 64
_HEADER = 65536  # bytes in which most images name their size
_ROW = np.dtype([("image", "<i8"), ("image_bytes", "<i8"), ("caption", "<i8"), ("caption_bytes", "<i8"), ("key", "S64")])


class SampleError(DataError):
    """One sample that cannot be used; the loader replaces it and reports it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as stored: an encoded image and its caption record."""

    key: str
    image: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar on disk, with its size and digest where a manifest knows them."""

    path: Path
    bytes: int | None = None
    sha256: str | None = None


class Shards:
    """The samples of one split, numbered through its shards."""

    def __init__(self, shards: Sequence[Shard], *, name: str, index_folder: Path, remedy: str) -> None:
        """Index `shards`. Raises DataError, ending in `remedy`, for one that is missing, damaged or another one."""
        self.name, self._remedy = name, remedy
        self.paths, self._index_folder = [shard.path for shard in shards], index_folder
        indices = [_index(shard, index_folder, remedy) for shard in shards]
        self._ends = np.cumsum([len(index) for index in indices], dtype=np.int64)
        self._rows: NDArray[Any] = np.concatenate(indices) if indices else np.empty(0, _ROW)
        self._files: OrderedDict[int, int] = OrderedDict()
        if not len(self):
            raise DataError(f"{name}: no samples in {len(shards)} shards; {remedy}")
        known = "".join(shard.sha256 or "" for shard in shards) if all(shard.sha256 for shard in shards) else None
        self.digest = hashlib.sha256(known.encode() if known else self._rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors stay in their process

    def read(self, i: int) -> Record:
        """Sample `i`. Raises SampleError when its image or caption is missing, DataError when the shard is."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        row = self._rows[i]
        key = row["key"].decode("utf-8", "replace")
        if not row["image"]:
            raise SampleError(key, f"no image file in {self.paths[shard].name}; one of {', '.join(sorted(IMAGES))} is expected")
        if not row["caption"]:
            raise SampleError(key, f"no caption file {CAPTION} in {self.paths[shard].name}")
        try:
            caption = self._pread(shard, row["caption"], row["caption_bytes"]).decode("utf-8")
        except UnicodeDecodeError:
            raise SampleError(key, "caption is not UTF-8") from None
        return Record(key=key, image=self._pread(shard, row["image"], row["image_bytes"]), caption=caption)

    def sizes(self) -> NDArray[np.int32]:
        """(width, height) of every image, as (samples, 2); (0, 0) where there is none. Raises DataError when a shard is lost."""
        caches = [_cache(path, self._index_folder, ".sizes.npy", self._remedy) for path in self.paths]
        starts = [0, *self._ends[:-1]]
        parts = [_cached(cache, np.dtype("<i4"), (end - start, 2)) for cache, start, end in zip(caches, starts, self._ends)]
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            total = sum(int(self._ends[number] - starts[number]) for number in missing)
            with progress(f"Measuring {self.name}", total, "images") as advance:
                for number in missing:
                    rows = self._rows[starts[number] : self._ends[number]]
                    part = np.array([self._measured(number, row) for row in rows], "<i4").reshape(-1, 2)
                    _keep(caches[number], part)
                    parts[number] = part
                    advance(len(rows))
        return np.concatenate([part for part in parts if part is not None])

    def _measured(self, shard: int, row: Any) -> tuple[int, int]:
        for length in dict.fromkeys([min(_HEADER, row["image_bytes"]), row["image_bytes"]]):  # all of it where much metadata leads
            if (size := measured(self._pread(shard, row["image"], length))) is not None:
                return size
        return 0, 0  # the loader replaces what cannot be decoded

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        path = self.paths[shard]
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[shard], int(size), int(offset))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {self._remedy}") from None
        self._files.move_to_end(shard)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        if len(data) != size:
            raise DataError(f"{path}: cut short while in use, {size} bytes expected at {offset}, {len(data)} found; {self._remedy}")
        return data


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write PNG `records` as one shard that appears under its name when it is complete; the same records make the same bytes."""
    from webdataset import TarWriter

    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        with TarWriter(file, mtime=0, user="hdm", group="hdm", mode=0o644) as writer:
            for record in records:
                writer.write({"__key__": record.key, "png": record.image, "txt": record.caption})
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _index(shard: Shard, folder: Path, remedy: str) -> NDArray[Any]:
    """One row per sample, from the cache when it was made for this very file."""
    try:
        status = shard.path.stat()
    except OSError as error:
        raise DataError(f"{shard.path}: shard cannot be read: {error.strerror}; {remedy}") from None
    size = status.st_size
    if shard.bytes not in (None, size):
        raise DataError(f"{shard.path}: shard is damaged, {shard.bytes} bytes expected, {size} found; {remedy}")
    cache = _cache(shard.path, folder, ".npy", remedy)
    if (known := _cached(cache, _ROW)) is not None:
        return known
    if shard.sha256 not in (None, sha256(shard.path)):
        raise DataError(f"{shard.path}: shard is damaged or another one, its SHA-256 is not that of the manifest; {remedy}")
    rows = _scan(shard.path, size, remedy)
    _keep(cache, rows)
    return rows


def _cache(path: Path, folder: Path, suffix: str, remedy: str) -> Path:
    """Where something about this very file is kept: its name holds a digest of the place, the size and the time of writing."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: shard cannot be read: {error.strerror}; {remedy}") from None
    version = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return folder / f"{path.stem}-{hashlib.blake2b(version.encode(), digest_size=8).hexdigest()}{suffix}"


def _cached(cache: Path, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> NDArray[Any] | None:
    """The array in `cache`; None when it is not there yet, or half written by an old crash."""
    try:
        rows = np.load(cache)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(rows) if rows.dtype == dtype and shape in (None, rows.shape) else None


def _keep(cache: Path, rows: NDArray[Any]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, rows)
        part.replace(cache)
    except OSError:
        pass  # a read-only place: it lives in memory


def _scan(path: Path, size: int, remedy: str) -> NDArray[Any]:
    rows: list[list[Any]] = []
    previous, end = None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem or not extension:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != previous:
                    rows.append([0, 0, 0, 0, key.encode()[:64]])
                    previous = key
                extension = "." + extension.lower()
                if extension in IMAGES:
                    rows[-1][0:2] = member.offset_data, member.size
                elif extension == CAPTION:
                    rows[-1][2:4] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); {remedy}") from None
    end = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    needed = end + 2 * tarfile.BLOCKSIZE  # a tar ends with two empty blocks
    if size < needed:
        raise DataError(f"{path}: shard is cut short, at least {needed} bytes expected, {size} found; {remedy}")
    with open(path, "rb") as file:
        file.seek(end)
        if any(file.read(2 * tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise DataError(f"{path}: shard is damaged at byte {end}; {remedy}")
    return np.array([tuple(row) for row in rows], dtype=_ROW)
