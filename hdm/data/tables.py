"""Rows of metadata from Parquet, JSON Lines or JSON files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hdm.config.errors import DataError

_KINDS = {".parquet", ".jsonl", ".json", ".ndjson"}


def table_files(path: str, key: str) -> list[Path]:
    """`path`, or the tables in it when it is a folder, sorted. Raises DataError, naming `key`, where there is none."""
    place = Path(path)
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in _KINDS) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{key}={path}: no such file, or no {', '.join(sorted(_KINDS))} in it; set {key} to the table or its folder"
        )
    return files


def rows(files: Sequence[Path], wanted: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every row of the tables, in order, with the `wanted` columns that there are; None: all."""
    for file in files:
        yield from _parquet(file, wanted) if file.suffix.lower() == ".parquet" else _lines(file)


def parquet(path: Path) -> Any:
    """An opened Parquet file. Raises DataError when it is none."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:120]}); copy it again") from None


def _parquet(path: Path, wanted: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    file = parquet(path)
    names = file.schema_arrow.names
    for batch in file.iter_batches(columns=[name for name in names if wanted is None or name in wanted]):
        yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: line {number} is no JSON ({error}); one object a line is expected") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is no object; one object a line is expected")
            yield row
