"""Copies of remote shards on this machine: bounded, the longest unused ones go first, shared by every process that names it.

A copy appears under its final name when it is complete. One process fetches it while others wait for its lock. Room is taken before
the first byte arrives, so processes together keep to the limit; what a killed process left half done is removed when room is
needed.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hdm.config.errors import DataError
from hdm.data.places import Address, Version, copy
from hdm.files import locked

_PAUSE = 0.1  # seconds between two looks for room


@dataclass(frozen=True, slots=True)
class Copies:
    """A folder of at most `limit` bytes of shards."""

    folder: Path
    limit: int

    def read(self, place: Address, version: Version, start: int, stop: int, remedy: str) -> bytes:
        """Bytes of a shard; it is copied whole when it is not here."""
        with self.opened(place, version, remedy) as file:
            return os.pread(file.fileno(), stop - start, start)

    def opened(self, place: Address, version: Version, remedy: str) -> BinaryIO:
        """The copy of a shard, marked as used now. What is open can be read to its end, whoever needs the room meanwhile."""
        path = self._path(place, version)
        while True:
            try:
                file = open(path, "rb")  # noqa: SIM115  the caller's
            except FileNotFoundError:  # never here, or another process needed the room
                self.fetch(place, version, remedy)
            else:
                os.utime(file.fileno())
                return file

    def fetch(self, place: Address, version: Version, remedy: str) -> Path:
        """Copy a shard unless it is here. Raises DataError when it, or the room for it, cannot be had."""
        path = self._path(place, version)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    self._copy(place, version, path, remedy)
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: cannot be written: {error.strerror}; make room, lower data.cache_gb or choose"
                " another place with datasets=FOLDER"
            ) from None
        return path

    def _copy(self, place: Address, version: Version, path: Path, remedy: str) -> None:
        if version.bytes > self.limit:
            raise DataError(
                f"{place}: has {version.bytes / 1e9:.3g} GB, more than data.cache_gb={self.limit / 1e9:g}; raise it, or set 0"
            )
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)  # a killed process left it
        while not self._reserved(part, version.bytes):
            time.sleep(_PAUSE)  # others are copying; what they have copied can go
        try:
            with open(part, "r+b") as file:
                copy(place, file, version.bytes, remedy)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserved(self, part: Path, needed: int) -> bool:
        """Make room for `part` and take it. False when copies that are being made leave none."""
        with locked(self.folder / "room"):
            self._clear_stale()
            copies = []
            for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime_ns, status.st_size, path))
            used = sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if used + needed > self.limit and path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    used -= size
            if used + needed > self.limit:
                return False
            with open(part, "wb") as file:
                file.truncate(needed)  # its room is taken, for whoever counts
            return True

    def _clear_stale(self) -> None:
        for stale in self.folder.glob("*.part"):
            with contextlib.suppress(OSError), open(stale.with_suffix(".lock"), "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody is copying it
                stale.unlink(missing_ok=True)

    def _path(self, place: Address, version: Version) -> Path:
        return self.folder / f"{place.stem}-{hashlib.blake2b(version.mark.encode(), digest_size=8).hexdigest()}.tar"
