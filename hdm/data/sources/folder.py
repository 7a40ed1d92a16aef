"""Your own shards: webdataset's format, read where they lie, on this machine or at an address (docs/data.md)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hdm.config.axes import DATA
from hdm.config.check import require
from hdm.config.errors import DataError
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.data.captions import parse_caption
from hdm.data.copies import Copies
from hdm.data.images import decode
from hdm.data.places import is_address, listing
from hdm.data.shards import SampleError, Shard, Shards
from hdm.data.source import Source


@dataclass(kw_only=True, slots=True)
class WebDatasetConfig:
    """Webdataset shards (tar) of images, each with a caption of the same name in .txt, in a folder or at an address."""

    path: str = option(
        "data", "folder of the shards, or an address that fsspec reads: s3://, gs://, https://, file://, memory:// …"
    )
    train: str = option("*.tar", "training shards, a pattern or a range as in train-{000..123}.tar; those of data.val are left out")
    val: str = option("val-*.tar", "held-out shards")
    images: int | None = option(None, "training images, for the plan of a run whose shards are elsewhere")
    window: int | None = option(None, "shards that are shuffled together; null: all of them")
    cache_gb: float = option(
        0.0, "disk for copies of remote shards, the longest unused ones are removed; 0: each sample is a request of its own"
    )

    def check(self, run: RunConfig) -> None:
        """Counts are positive; no password in what is stored with every run."""
        require(self.images is None or self.images > 0, f"data.images={self.images}: must be above 0, or null")
        require(self.window is None or self.window > 0, f"data.window={self.window}: must be above 0, or null for all shards")
        require(self.cache_gb >= 0, f"data.cache_gb={self.cache_gb}: must be 0 or above")
        require(
            not ("://" in self.path and urlsplit(self.path).password),
            "data.path: holds a password, and runs store and share it; leave it out and give it by the environment or fsspec's own"
            " configuration file",
        )


@DATA.register("webdataset", WebDatasetConfig)
class WebDataset(Source):
    """Shards that somebody else made. Nothing is written beside them: their index is kept with the prepared data sets."""

    config: WebDatasetConfig

    def prepare(self, datasets: Path) -> Path:
        """Index the shards; return the folder of the index."""
        for split in ("train", "val"):
            self.open(datasets, split)
        return self._index(datasets)

    def open(self, datasets: Path, split: str) -> Shards:
        """See `Source.open`."""
        held_out = listing(self.config.path, self.config.val)
        files = (
            held_out if split == "val" else [path for path in listing(self.config.path, self.config.train) if path not in held_out]
        )
        pattern = getattr(self.config, split)
        if not files:
            hint = (
                "; name some shards so, or choose others: data.val='…'"
                if split == "val"
                else "; set data.path to the folder that holds them"
            )
            raise DataError(f"data.path={self.config.path}: no shard matches data.{split}='{pattern}'{hint}")
        remote = is_address(self.config.path)
        name = self.config.path.rstrip("/").rpartition("/")[2] if remote else Path(self.config.path).resolve().name
        shards = Shards(
            [Shard(path) for path in files],
            name=f"{name}/{pattern}",
            index_folder=self._index(datasets),
            remedy="see that it can be reached, then give the same command again" if remote else "copy it again",
            copies=self._copies(datasets) if remote else None,
            window=self.config.window if split == "train" else None,
        )
        if remote and self.config.cache_gb and split == "train":
            self._fits(shards)
        return shards

    def _copies(self, datasets: Path) -> Copies | None:
        limit = int(self.config.cache_gb * 1e9)
        return Copies(self._index(datasets) / "copies", limit) if limit else None

    def _fits(self, shards: Shards) -> None:
        """Refuse a cache that would fetch the same shards over and over: two windows are in use where one ends."""
        needed = shards.total_bytes
        if self.config.window is not None:
            needed = min(needed, sum(sorted(shards.shard_bytes, reverse=True)[: 2 * self.config.window]))
        if needed > self.config.cache_gb * 1e9:
            raise DataError(
                f"data.cache_gb={self.config.cache_gb:g}: {needed / 1e9:.3g} GB of shards are in use at a time; raise it, shuffle"
                " fewer shards together (data.window=…), or set data.cache_gb=0 to request each sample by itself"
            )

    def verify(self, datasets: Path) -> None:
        """Decode every sample. Raises DataError with the first ones that cannot be used."""
        bad = []
        for split in ("train", "val"):
            shards = self.open(datasets, split)
            for i in range(len(shards)):
                try:
                    record = shards.read(i)
                    parse_caption(record.caption)
                    decode(record.image, 1)
                except SampleError as error:
                    bad.append(str(error))
                except DataError as error:
                    bad.append(f"{record.key}: {error}")
        if bad:
            raise DataError(
                f"data.path={self.config.path}: {len(bad)} samples cannot be used and will be skipped: {'; '.join(bad[:5])}"
            )

    def repair(self, datasets: Path) -> None:
        """These shards are not made here."""
        raise DataError(f"data.path={self.config.path}: these shards were made elsewhere; copy the damaged ones again")

    def _index(self, datasets: Path) -> Path:
        place = self.config.path if is_address(self.config.path) else str(Path(self.config.path).resolve())
        return datasets / f"webdataset-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"
