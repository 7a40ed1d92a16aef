"""A folder of pictures, each with a text file of the same name: what tools for fine-tuning use (kohya's scripts among them)."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hdm.config.axes import DATA
from hdm.config.check import require
from hdm.config.errors import DataError
from hdm.config.registry import option
from hdm.config.schema import CollectedConfig, RunConfig
from hdm.data.collected import CollectedSource, Item
from hdm.data.health import PICTURES, UnusableError


@dataclass(kw_only=True, slots=True)
class FolderConfig(CollectedConfig):
    """A folder of pictures with captions of the same name in .txt, sub-folders included, packed into shards once."""

    path: str = option("pictures", "the folder")
    caption: str = option(".txt", "extension of the captions")
    group: str = option(
        "", "regular expression; pictures whose keys agree in its first group are held out together, as in '^(.*)_\\d+$'"
    )

    def check(self, run: RunConfig) -> None:
        """A pattern with one group."""
        CollectedConfig.check(self, run)
        try:
            groups = re.compile(self.group).groups
        except re.error as error:
            groups = -1
            require(False, f"data.group={self.group}: is no regular expression ({error}); '^([^/]+)/' is the first sub-folder")
        require(not self.group or groups == 1, f"data.group={self.group}: needs one (…); '^([^/]+)/' is the first sub-folder")


@DATA.register("folder", FolderConfig)
class Folder(CollectedSource):
    """See FolderConfig. The key of a picture is its path in the folder, without the extension."""

    config: FolderConfig

    @property
    def origin(self) -> str:
        """The folder."""
        return self.config.path

    def collect(self) -> Iterator[Item]:
        """Every picture, and every caption that has none, sorted by path."""
        root = Path(self.config.path)
        if not root.is_dir():
            raise DataError(f"data.path={self.config.path}: is no folder; set data.path to the folder of the pictures")
        for place, folders, names in os.walk(root, onerror=self._unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = Path(place)
            captions = {Path(name).stem: name for name in names if Path(name).suffix.lower() == self.config.caption}
            pictured = set()
            for name in sorted(names):
                path = here / name
                if name.startswith(".") or path.suffix.lower() not in PICTURES:
                    if name not in captions.values():
                        self.left_out["other files"] += 1
                    continue
                pictured.add(path.stem)
                yield self._item(root, path, captions.get(path.stem))
            for stem in sorted(set(captions) - pictured):
                path = here / captions[stem]
                yield Item(key=f"{path.relative_to(root)}", where=str(path), fault="caption without a picture")

    def load(self, item: Item) -> tuple[bytes, bytes]:
        """See `CollectedSource.load`."""
        path = Path(item.where)
        try:
            text = (path.parent / item.caption).read_bytes()
        except OSError as error:
            raise UnusableError("cannot be read", f"{item.caption}: {error.strerror}") from None
        return path.read_bytes(), text

    def _item(self, root: Path, path: Path, caption: str | None) -> Item:
        key = path.relative_to(root).with_suffix("").as_posix().encode(errors="replace").decode()
        match = re.search(self.config.group, key) if self.config.group else None
        try:
            states = [os.stat(p) for p in (path, path.parent / (caption or path.name))]
            state = " ".join(f"{s.st_size}/{s.st_mtime_ns}" for s in states)
        except OSError:
            state = "unreadable"
        return Item(
            key=key,
            where=str(path),
            caption=caption or "",
            group=match[1] or "" if match else "",
            state=state,
            fault="" if caption else f"no caption ({self.config.caption})",
        )

    def _unreadable(self, error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; change its permissions or move it elsewhere")
