"""Parquet files that hold pictures and captions, as data hubs store them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm.config.axes import DATA
from hdm.config.errors import DataError, suggest
from hdm.config.registry import option
from hdm.config.schema import CollectedConfig
from hdm.data.collected import CollectedSource, Item
from hdm.data.health import UnusableError
from hdm.data.tables import parquet


@dataclass(kw_only=True, slots=True)
class ParquetConfig(CollectedConfig):
    """Parquet files with a column of pictures (bytes, or names of files) and one of captions, packed into shards once."""

    path: str = option("data.parquet", "a Parquet file, or a folder of them")
    image: str = option("image", "column of the pictures: bytes, a struct with bytes or path, or the name of a file in data.files")
    caption: str = option("caption", "column of the captions")
    key: str | None = option(None, "column of unique names; null: file and row number")
    group: str | None = option(None, "column; rows that agree in it are held out together")
    files: str | None = option(None, "folder of the files that data.image names; null: the one of the Parquet files")


@DATA.register("parquet", ParquetConfig)
class Parquet(CollectedSource):
    """See ParquetConfig."""

    config: ParquetConfig

    def __init__(self, config: ParquetConfig) -> None:
        super().__init__(config)
        self._open: tuple[str, int, Any] = ("", -1, None)

    @property
    def origin(self) -> str:
        """The file or folder."""
        return self.config.path

    def collect(self) -> Iterator[Item]:
        """Every row, file by file."""
        place = Path(self.config.path)
        files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise DataError(f"data.path={self.config.path}: no Parquet file there; set data.path to one, or to a folder of them")
        for path in files:
            yield from self._items(path, path.relative_to(place if place.is_dir() else place.parent))

    def load(self, item: Item) -> tuple[bytes, bytes | str]:
        """See `CollectedSource.load`. The last row group stays in memory: a shard's rows follow each other."""
        path, _, number = item.where.rpartition("#")
        if self._open[:2] != (path, int(number)):
            self._open = (path, int(number), self._columns(path, int(number)))
        table = self._open[2]
        text = table[self.config.caption][item.row].as_py()
        if text is None:
            raise UnusableError("no caption")
        return self._picture(table[self.config.image][item.row].as_py(), Path(path).parent), text

    def _items(self, path: Path, name: Path) -> Iterator[Item]:
        file, stat = parquet(path), path.stat()
        known = file.schema_arrow.names
        for field in ("image", "caption", "key", "group"):
            column = getattr(self.config, field)
            if column is not None and column not in known:
                raise DataError(
                    f"data.{field}={column}: {path} has no such column{suggest(column, known)} (columns: {', '.join(known)})"
                )
        columns = [column for column in (self.config.key, self.config.group) if column]
        total = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            table = file.read_row_group(number, columns=columns).to_pydict() if columns else {}
            for row in range(count):
                key = (
                    str(table[self.config.key][row]) if self.config.key else f"{name.with_suffix('').as_posix()}-{total + row:08d}"
                )
                group = table[self.config.group][row] if self.config.group else None
                yield Item(
                    key=key,
                    where=f"{path}#{number}",
                    row=row,
                    group="" if group is None else str(group),
                    state=f"{stat.st_size}/{stat.st_mtime_ns}",
                )
            total += count

    def _columns(self, path: str, number: int) -> Any:
        import pyarrow

        try:
            table = parquet(Path(path)).read_row_group(number, columns=[self.config.image, self.config.caption])
            caption = table[self.config.caption]
            if pyarrow.types.is_string(caption.type) or pyarrow.types.is_large_string(caption.type):
                caption = caption.cast(pyarrow.large_binary())  # decoded where a wrong byte costs one sample
            return {self.config.image: table[self.config.image], self.config.caption: caption}
        except pyarrow.ArrowException as error:
            raise UnusableError("damaged Parquet file", " ".join(str(error).split())[:120]) from None

    def _picture(self, value: Any, beside: Path) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not value:
            raise UnusableError("no picture")
        folder = Path(self.config.files) if self.config.files else beside
        path = (folder / str(value)).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UnusableError("a name that leads out of data.files", str(value)[:80])
        return path.read_bytes()
