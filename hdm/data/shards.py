"""Webdataset shards, read by number instead of as a stream.

A shard is a tar; a sample is a run of members that share a name up to the first dot: `000042.png` and `000042.txt`. An index of
each tar (where each sample's image and caption lie) is made once and kept in `index_folder`; reading sample i is then two `pread`s,
or one request where shards lie at an address. That makes the order of a run a matter of arithmetic (`hdm.data.order`), and a
resumed run starts at once, wherever it was. Crops that depend on the images' sizes ask for `Shards.sizes`: every header is read
once and kept beside the index. Both may also lie beside a shard (`write_sidecars`), so that a remote one need not be read through.
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hdm.cli import progress
from hdm.config.errors import DataError
from hdm.data import places
from hdm.data.copies import Copies
from hdm.data.deck import Deck, Shuffled, Windowed
from hdm.data.images import measured
from hdm.data.places import Address, Place, Range, Version
from hdm.files import replacing, sha256

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
CAPTION = ".txt"
_OPEN_FILES = 64
_HEADER = 65536  # bytes in which most images name their size
_GAP = 65536  # bytes between image and caption that are read along rather than asked for twice
_FETCHED_AT_ONCE = _INDEXED_AT_ONCE = 4  # remote shards
_ROW = np.dtype([("image", "<i8"), ("image_bytes", "<i8"), ("caption", "<i8"), ("caption_bytes", "<i8"), ("key", "S64")])
_SIZE = np.dtype("<i4")


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
    extension: str = "png"  # of the image, when it is written


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar, with its size and digest where a manifest knows them."""

    path: Place
    bytes: int | None = None
    sha256: str | None = None


class Shards:
    """The samples of one split, numbered through its shards."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        name: str,
        index_folder: Path,
        remedy: str,
        copies: Copies | None = None,
        window: int | None = None,
    ) -> None:
        """Index `shards`. Raises DataError, ending in `remedy`, for one that is missing, damaged or another one.

        Remote shards are read through `copies`, or without by ranges. `window` shards are shuffled together; None: all.
        """
        self.name, self._remedy, self._copies, self._window = name, remedy, copies, window
        self.paths, self._index_folder = [shard.path for shard in shards], index_folder
        self._remote = any(isinstance(path, Address) for path in self.paths)
        self._versions = places.versions(self.paths, remedy)
        indices = self._indexed(shards)
        self._ends = np.cumsum([len(index) for index in indices], dtype=np.int64)
        self._rows: NDArray[Any] = np.concatenate(indices) if indices else np.empty(0, _ROW)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._fetched: dict[int, bytes] = {}
        if not len(self):
            raise DataError(f"{name}: no samples in {len(shards)} shards; {remedy}")
        known = "".join(shard.sha256 or "" for shard in shards) if all(shard.sha256 for shard in shards) else None
        self.digest = hashlib.sha256(known.encode() if known else self._rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_fetched": {}}  # descriptors stay in their process

    @property
    def shard_bytes(self) -> list[int]:
        """The size of every shard."""
        return [version.bytes for version in self._versions]

    @property
    def total_bytes(self) -> int:
        """The size of all shards."""
        return sum(self.shard_bytes)

    def deck(self, seed: int, *, purpose: str = "order") -> Deck:
        """The records as a run with `seed` sees them."""
        if self._window is not None and self._window < len(self._ends):
            return Windowed(seed, self._ends, window=self._window, purpose=purpose)
        return Shuffled(seed, len(self), purpose=purpose)

    def read(self, i: int) -> Record:
        """Sample `i`. Raises SampleError when its image or caption is missing, DataError when the shard is."""
        shard, row = self._shard(i), self._rows[i]
        key = row["key"].decode("utf-8", "replace")
        if not row["image"]:
            raise SampleError(key, f"no image file in {self.paths[shard].name}; one of {', '.join(sorted(IMAGES))} is expected")
        if not row["caption"]:
            raise SampleError(key, f"no caption file {CAPTION} in {self.paths[shard].name}")
        image, text = self._parts(i, shard, row)
        try:
            caption = text.decode("utf-8")
        except UnicodeDecodeError:
            raise SampleError(key, "caption is not UTF-8") from None
        return Record(key=key, image=image, caption=caption)

    def fetch(self, numbers: Sequence[int]) -> None:
        """Request samples that will be read next, all at once; they are kept until they are read, or others are fetched.

        Does nothing for shards on this machine. Raises DataError when a shard cannot be reached.
        """
        self._fetched = {}
        if not self._remote:
            return
        if self._copies is not None:
            wanted = sorted({self._shard(n) for n in numbers})
            with ThreadPoolExecutor(min(len(wanted), _FETCHED_AT_ONCE)) as pool:
                list(pool.map(self._copied, wanted))
        elif spans := {n: span for n in dict.fromkeys(numbers) if (span := self._span(n)) is not None}:
            self._fetched = dict(zip(spans, places.read_many(list(spans.values()), self._remedy)))

    def sizes(self) -> NDArray[np.int32]:
        """(width, height) of every image, as (samples, 2); (0, 0) where there is none. Raises DataError when a shard is lost."""
        versions = self._versions if self._remote else places.versions(self.paths, self._remedy)
        caches = [_cache(path, version, self._index_folder, ".sizes.npy") for path, version in zip(self.paths, versions)]
        starts = [0, *self._ends[:-1]]
        parts = [_cached(cache, _SIZE, (end - start, 2)) for cache, start, end in zip(caches, starts, self._ends)]
        for number, path in enumerate(self.paths):
            if parts[number] is None and isinstance(path, Address):
                parts[number] = _sidecar(path, ".sizes.npy", _SIZE, (self._ends[number] - starts[number], 2))
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            total = sum(int(self._ends[number] - starts[number]) for number in missing)
            with progress(f"Measuring {self.name}", total, "images") as advance:
                for number in missing:
                    rows = self._rows[starts[number] : self._ends[number]]
                    part = np.array([self._measured(number, row) for row in rows], _SIZE).reshape(-1, 2)
                    _keep(caches[number], part)
                    parts[number] = part
                    advance(len(rows))
        return np.concatenate([part for part in parts if part is not None])

    def write_sidecars(self) -> None:
        """Put index and sizes beside every shard on this machine, for those who will read them from afar."""
        sizes, start = self.sizes(), 0
        for path, end in zip(self.paths, self._ends):
            if isinstance(path, Path):
                for suffix, part in ((".index.npy", self._rows[start:end]), (".sizes.npy", sizes[start:end])):
                    with replacing(path.with_name(path.name + suffix)) as partial, open(partial, "wb") as file:
                        np.save(file, part)
            start = int(end)

    def _indexed(self, shards: Sequence[Shard]) -> list[NDArray[Any]]:
        """The rows of every shard."""

        def one(number: int) -> NDArray[Any]:
            return _index(shards[number], self._versions[number], self._index_folder, self._remedy, self._copies)

        if not self._remote:
            return [one(number) for number in range(len(shards))]
        found: list[NDArray[Any]] = []
        with progress(f"Indexing {self.name}", len(shards), "shards") as advance, ThreadPoolExecutor(_INDEXED_AT_ONCE) as pool:
            for rows in pool.map(one, range(len(shards))):
                found.append(rows)
                advance(1)
        return found

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self._ends, i, side="right"))

    def _parts(self, i: int, shard: int, row: Any) -> tuple[bytes, bytes]:
        """The bytes of image and caption."""
        span = None if self._copies is not None else self._span(i)
        if span is None:
            caption = self._pread(shard, row["caption"], row["caption_bytes"])
            return self._pread(shard, row["image"], row["image_bytes"]), caption
        data = self._fetched.pop(i, None) or places.read(span, self._remedy)
        first, second = int(row["image"]) - span.start, int(row["caption"]) - span.start
        return data[first : first + int(row["image_bytes"])], data[second : second + int(row["caption_bytes"])]

    def _span(self, i: int) -> Range | None:
        """The one request that holds sample `i`; None for one that is incomplete, spread out or on this machine."""
        place, row = self.paths[self._shard(i)], self._rows[i]
        if not isinstance(place, Address) or not row["image"] or not row["caption"]:
            return None
        first, second = sorted([(row["image"], row["image_bytes"]), (row["caption"], row["caption_bytes"])])
        if second[0] - first[0] - first[1] > _GAP:
            return None
        return Range(place, int(first[0]), int(second[0] + second[1]))

    def _copied(self, shard: int) -> None:
        place = self.paths[shard]
        assert self._copies is not None and isinstance(place, Address)
        self._copies.fetch(place, self._versions[shard], self._remedy)

    def _measured(self, shard: int, row: Any) -> tuple[int, int]:
        for length in dict.fromkeys([min(_HEADER, row["image_bytes"]), row["image_bytes"]]):  # all of it where much metadata leads
            if (size := measured(self._pread(shard, row["image"], length))) is not None:
                return size
        return 0, 0  # the loader replaces what cannot be decoded

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        path, offset, size = self.paths[shard], int(offset), int(size)
        if isinstance(path, Address):
            if self._copies is None:
                return places.read(Range(path, offset, offset + size), self._remedy) if size else b""
            data = self._copies.read(path, self._versions[shard], offset, offset + size, self._remedy)
        else:
            data = self._local(shard, path, offset, size)
        if len(data) != size:
            raise DataError(f"{path}: cut short while in use, {size} bytes expected at {offset}, {len(data)} found; {self._remedy}")
        return data

    def _local(self, shard: int, path: Path, offset: int, size: int) -> bytes:
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {self._remedy}") from None
        self._files.move_to_end(shard)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return data


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write `records` as one shard that appears under its name when it is complete; the same records make the same bytes."""
    from webdataset import TarWriter

    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        with TarWriter(file, mtime=0, user="hdm", group="hdm", mode=0o644) as writer:
            for record in records:
                writer.write({"__key__": record.key, record.extension: record.image, "txt": record.caption})
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _index(shard: Shard, version: Version, folder: Path, remedy: str, copies: Copies | None) -> NDArray[Any]:
    """One row per sample, from the cache when it was made for this very file, else from beside a remote one, else from the tar."""
    path = shard.path
    if shard.bytes not in (None, version.bytes):
        raise DataError(f"{path}: shard is damaged, {shard.bytes} bytes expected, {version.bytes} found; {remedy}")
    cache = _cache(path, version, folder, ".npy")
    if (known := _cached(cache, _ROW)) is not None:
        return known
    if isinstance(path, Path) and shard.sha256 not in (None, sha256(path)):
        raise DataError(f"{path}: shard is damaged or another one, its SHA-256 is not that of the manifest; {remedy}")
    if isinstance(path, Address) and (beside := _sidecar(path, ".index.npy", _ROW)) is not None and _fits(beside, version.bytes):
        rows = beside
    elif isinstance(path, Address) and copies is not None:
        rows = _scan(path, partial(copies.opened, path, version, remedy), version.bytes, remedy)
    else:
        rows = _scan(path, partial(places.opened, path, version.bytes, remedy), version.bytes, remedy)
    _keep(cache, rows)
    return rows


def _cache(place: Place, version: Version, folder: Path, suffix: str) -> Path:
    """Where something about this very file is kept: its name holds a digest of the version."""
    return folder / f"{place.stem}-{hashlib.blake2b(version.mark.encode(), digest_size=8).hexdigest()}{suffix}"


def _cached(cache: Path, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> NDArray[Any] | None:
    """The array in `cache`; None when it is not there yet, or half written by an old crash."""
    try:
        rows = np.load(cache)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(rows) if rows.dtype == dtype and shape in (None, rows.shape) else None


def _sidecar(place: Address, suffix: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> NDArray[Any] | None:
    """The array beside a remote shard; None when there is none, or none that makes sense."""
    data = places.whole(place.beside(place.name + suffix))
    if data is None:
        return None
    with contextlib.suppress(ValueError, EOFError, OSError):
        rows = np.load(io.BytesIO(data))
        if rows.dtype == dtype and shape in (None, rows.shape):
            return np.asarray(rows)
    return None


def _fits(rows: NDArray[Any], size: int) -> bool:
    """Whether an index can be that of a tar of `size` bytes: it ends within the padding behind the last member."""
    ends = [int((rows[name] + rows[f"{name}_bytes"]).max(initial=0)) for name in ("image", "caption")]
    return max(ends) + 2 * tarfile.BLOCKSIZE <= size <= max(ends) + 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE


def _keep(cache: Path, rows: NDArray[Any]) -> None:
    with contextlib.suppress(OSError):  # a read-only place: it lives in memory
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, rows)
        part.replace(cache)


def _scan(path: Place, opened: Callable[[], BinaryIO], size: int, remedy: str) -> NDArray[Any]:
    rows: list[list[Any]] = []
    previous, end = None, 0
    try:
        with opened() as file, tarfile.open(fileobj=file, mode="r:") as tar:
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
            end = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            file.seek(end)
            behind = file.read(2 * tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); {remedy}") from None
    needed = end + 2 * tarfile.BLOCKSIZE  # a tar ends with two empty blocks
    if size < needed:
        raise DataError(f"{path}: shard is cut short, at least {needed} bytes expected, {size} found; {remedy}")
    if any(behind):  # tarfile takes a damaged header for the end
        raise DataError(f"{path}: shard is damaged at byte {end}; {remedy}")
    return np.array([tuple(row) for row in rows], dtype=_ROW)
