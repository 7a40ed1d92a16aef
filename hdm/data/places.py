"""Where shards are: a path on this machine, or an address that fsspec reads (s3://, gs://, https://, file://, memory:// …).

What is read from an address is retried with growing pauses when the failure may pass; what cannot pass (no such file, no access) is
an error at once. Both are one line that names the address. Credentials come from the environment or fsspec's own configuration
files, never from a run's, which are stored and shared.
"""

import fnmatch
import io
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from hdm.config.errors import DataError

_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts
_AT_ONCE = 16  # requests for facts of files; reads are as parallel as fsspec's file system makes them
_BUFFER = 1 << 20  # bytes of a request when a shard is read through for its index
_CHUNK = 8 << 20  # bytes of a request when a whole shard is copied
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, ValueError, TypeError)
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created", "updated")  # of a version, by file system

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """A file that fsspec reads."""

    text: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return re.split(r"[?#]", self.text)[0].rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return self.name.rpartition(".")[0] or self.name

    def beside(self, name: str) -> "Address":
        """Another file in the same folder."""
        return Address(f"{self.text.rpartition('/')[0]}/{name}")

    def __str__(self) -> str:
        return self.text


Place = Path | Address


@dataclass(frozen=True, slots=True)
class Version:
    """The bytes of a file and a text that another version of it does not have."""

    bytes: int
    mark: str


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes `start` to `stop` of a file."""

    place: Address
    start: int
    stop: int


def is_address(text: str) -> bool:
    """Whether fsspec is meant, and no path on this machine."""
    return "://" in text


def listing(base: str, pattern: str) -> list[Place]:
    """The files of `base`, a folder or an address, that match `pattern`, sorted. `{000..012}` stands for names and asks nobody."""
    if not pattern:
        return []
    if re.search(r"\{\d+\.\.\d+\}", pattern):
        expanded = _expanded(pattern)
        return [Address(f"{base.rstrip('/')}/{name}") if is_address(base) else Path(base) / name for name in expanded]
    if not is_address(base):
        return [*sorted(Path(base).glob(pattern))]
    here = Address(base)

    def names() -> list[str]:
        system, path = _opened(here)
        try:
            found = system.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    found = _patiently(here, names)
    return [Address(f"{base.rstrip('/')}/{name}") for name in sorted(set(found)) if fnmatch.fnmatch(name, pattern)]


def versions(places: Sequence[Place], remedy: str) -> list[Version]:
    """The version of every file. Raises DataError, ending in `remedy`, for one that cannot be read."""
    if not any(isinstance(place, Address) for place in places):
        return [version(place, remedy) for place in places]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda place: version(place, remedy), places))


def version(place: Place, remedy: str) -> Version:
    """The version of a file. Raises DataError, ending in `remedy`, when it cannot be read."""
    if isinstance(place, Path):
        try:
            status = place.stat()
        except OSError as error:
            raise DataError(f"{place}: shard cannot be read: {error.strerror}; {remedy}") from None
        return Version(status.st_size, f"{place.resolve()} {status.st_size} {status.st_mtime_ns}")

    def facts() -> dict[str, Any]:
        system, path = _opened(place)
        system.invalidate_cache()
        return dict(system.info(path))

    known = _patiently(place, facts, remedy)
    if known.get("size") is None:
        raise DataError(f"{place}: the server does not say how long it is; copy it to this machine and set data.path to the copy")
    return Version(int(known["size"]), " ".join([str(place), str(known["size"]), *(str(known.get(mark, "")) for mark in _MARKS)]))


def read(wanted: Range, remedy: str) -> bytes:
    """Some bytes of a file. Raises DataError, ending in `remedy`, when they cannot be had."""

    def bytes_() -> bytes:
        system, path = _opened(wanted.place)
        return _complete(system.cat_file(path, start=wanted.start, end=wanted.stop), wanted)

    return _patiently(wanted.place, bytes_, remedy)


def read_many(wanted: Sequence[Range], remedy: str) -> list[bytes]:
    """Several ranges, requested at once where the file system can; those that fail are tried again one by one."""
    try:
        system, _ = _opened(wanted[0].place)
        paths = [_opened(one.place)[1] for one in wanted]
        found = system.cat_ranges(paths, [one.start for one in wanted], [one.stop for one in wanted], on_error="return")
    except Exception:  # whatever it was, the requests one by one will say it again
        found = [b""] * len(wanted)
    good = [data if isinstance(data, bytes) and len(data) == one.stop - one.start else None for data, one in zip(found, wanted)]
    return [read(one, remedy) if data is None else data for data, one in zip(good, wanted)]


def copy(place: Address, file: BinaryIO, size: int, remedy: str, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write the whole of a file of `size` bytes; a connection that breaks goes on where it was."""
    for start in range(0, size, _CHUNK):
        data = read(Range(place, start, min(start + _CHUNK, size)), remedy)
        file.write(data)
        advance(len(data))


def opened(place: Place, size: int, remedy: str) -> BinaryIO:
    """A file to read from front to back, with jumps."""
    return open(place, "rb") if isinstance(place, Path) else io.BufferedReader(_Stream(place, size, remedy), _BUFFER)


class _Stream(io.RawIOBase):
    """A remote file of known size as a stream. Jumps ask for nothing: only what is read travels."""

    def __init__(self, place: Address, size: int, remedy: str) -> None:
        super().__init__()
        self._place, self._size, self._remedy, self._at = place, size, remedy, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = read(Range(self._place, self._at, stop), self._remedy)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


def whole(place: Place) -> bytes | None:
    """All of a small file; None where there is none."""
    try:
        if isinstance(place, Path):
            return place.read_bytes()
        return _patiently(place, lambda: bytes(_opened(place)[0].cat_file(_opened(place)[1])))
    except (OSError, DataError):
        return None


def _complete(data: bytes, wanted: Range) -> bytes:
    size = wanted.stop - wanted.start
    if len(data) > size:
        raise ValueError(
            "the server ignores ranges and sends whole files; copy the shards to this machine and set data.path to them"
        )
    if len(data) < size:
        raise OSError(f"{len(data)} of {size} bytes at {wanted.start} arrived")
    return data


def _opened(place: Address) -> tuple[Any, str]:
    """fsspec's file system, which it keeps for each process, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if re.match(r"https?://", place.text):  # fsspec would wait five minutes for a server that says nothing
        import aiohttp

        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)}}
    system, path = fsspec.core.url_to_fs(place.text, **options)
    return system, path


def _patiently(place: Address, action: Callable[[], T], remedy: str = "see that it can be reached, then try again") -> T:
    """What `action` returns, after up to five attempts."""
    for pause in (*_PAUSES, None):
        try:
            return action()
        except Exception as error:  # file systems raise whatever their libraries do
            reason = " ".join(str(error).replace(place.text, "").split()).strip(" :") or type(error).__name__
            status = getattr(error, "status", None)  # of an HTTP answer
            lasting = isinstance(error, _LASTING) or (status is not None and 400 <= status < 500 and status not in (408, 429))
            if isinstance(error, FileNotFoundError):
                reason = "no such file"
            if isinstance(error, ImportError):
                remedy = "pip install -e '.[remote]' brings the file systems of s3:// and gs://"
            if lasting:
                raise DataError(f"{place}: cannot be read: {reason[:160]}; {remedy}") from None
            if pause is None:
                raise DataError(f"{place}: cannot be read, {len(_PAUSES) + 1} attempts failed: {reason[:160]}; {remedy}") from None
            time.sleep(pause)
    raise AssertionError


def _expanded(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    names = [f"{pattern[: match.start()]}{n:0{len(first)}d}{pattern[match.end() :]}" for n in range(int(first), int(last) + 1)]
    return [whole for name in names for whole in _expanded(name)]
