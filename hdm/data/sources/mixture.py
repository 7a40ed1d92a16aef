"""Several data sets as one, in given shares."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm.config.axes import DATA
from hdm.config.check import require
from hdm.config.errors import ConfigError, DataError
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.data.deck import Deck, Mixture
from hdm.data.shards import Record, SampleError, Shards
from hdm.data.source import Source


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """One data set of a mixture."""

    name: str = option("", "label, by which its order is drawn; must differ from the others'")
    weight: float = option(1.0, "its samples are weight / (sum of all weights) of the run's")
    set: list[str] = option([], "its own lines: data=…, data.path=…")
    validate: bool = option(True, "its held-out images are looked at in validation")

    def composed(self, key: str) -> Any:
        """The config of its own data axis. Raises ConfigError, naming `key`, for lines that cannot be used."""
        from hdm.config.compose import compose

        try:
            return compose(self.set).data
        except ConfigError as error:
            raise ConfigError(f"{key} '{self.name}': {error}") from None


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """Several data sets in shares that are weights, not sizes; each is walked in its own epochs."""

    sources: list[PartConfig] = option([], "the data sets: {name: …, weight: …, set: ['data=…', 'data.path=…']}")
    images: int | None = option(None, "training images, for the plan of a run whose shards are elsewhere")

    def check(self, run: RunConfig) -> None:
        """Names and weights that can be told apart, and lines that say only what the data are."""
        require(len(self.sources) > 0, "data.sources: is empty; write data.sources=[{name: a, weight: 1, set: ['data=…']}, …]")
        require(self.images is None or self.images > 0, f"data.images={self.images}: must be above 0, or null")
        names = [part.name for part in self.sources]
        for i, part in enumerate(self.sources):
            key = f"data.sources[{i}]"
            require(bool(part.name), f"{key}.name: is empty; give each source a name of its own")
            require(names.index(part.name) == i, f"{key}.name={part.name}: is that of another source too; rename one")
            require(part.weight > 0, f"{key}.weight={part.weight}: must be above 0; leave the source out instead")
            others = [line for line in part.set if line.partition("=")[0].partition(".")[0] != "data"]
            require(
                not others, f"{key}.set: {' '.join(others)} is not about data; only lines data=… and data.FIELD=… can stand here"
            )
            require("data=mixture" not in part.set, f"{key}.set: a mixture in a mixture; name its sources here instead")
        require(
            any(part.validate for part in self.sources),
            "data.sources: validate=false for every one; leave held-out images of one of them at least",
        )
        for i, part in enumerate(self.sources):
            part.composed(f"data.sources[{i}]")


@DATA.register("mixture", MixtureConfig)
class MixtureSource(Source):
    """See MixtureConfig."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.parts: list[Source] = [DATA.build(part.composed(f"data.sources[{i}]")) for i, part in enumerate(config.sources)]

    def prepare(self, datasets: Path) -> Path:
        """Prepare every source; return the folder that holds them all."""
        for source in self.parts:
            source.prepare(datasets)
        return datasets

    def open(self, datasets: Path, split: str) -> Shards:
        """See `Source.open`."""
        used = [i for i, part in enumerate(self.config.sources) if split == "train" or part.validate]
        parts = []
        for i in used:
            try:
                parts.append(self.parts[i].open(datasets, split))
            except DataError as error:
                hint = "; or set validate: false for it" if split == "val" else ""
                raise DataError(f"data.sources[{i}] '{self.config.sources[i].name}': {error}{hint}") from None
        return Mixed(
            parts,
            names=[self.config.sources[i].name for i in used],
            weights=[self.config.sources[i].weight for i in used],
        )

    def verify(self, datasets: Path) -> None:
        """Verify every source."""
        for source in self.parts:
            source.verify(datasets)

    def repair(self, datasets: Path) -> None:
        """Repair every source that was made here."""
        for source in self.parts:
            source.repair(datasets)

    def facts(self) -> dict[str, Any]:
        """Those of every source, under its name."""
        named = zip(self.config.sources, self.parts)
        return {f"{part.name}/{key}": value for part, source in named for key, value in source.facts().items()}

    def command(self, datasets: Path, *flags: str) -> str:
        """The command lines of all sources, one after the other."""
        return " && ".join(source.command(datasets, *flags) for source in self.parts)


class Mixed(Shards):
    """The samples of several data sets, numbered through; a record's key begins with the name of its data set."""

    def __init__(self, parts: Sequence[Shards], *, names: Sequence[str], weights: Sequence[float]) -> None:
        self._sets, self._names, self._weights = list(parts), list(names), list(weights)
        self.name = "+".join(names)
        self.paths = [path for part in parts for path in part.paths]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        said = [f"{name} {weight} {part.digest}" for name, weight, part in zip(names, weights, parts)]
        self.digest = hashlib.sha256("\n".join(said).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @property
    def shard_bytes(self) -> list[int]:
        """See `Shards.shard_bytes`."""
        return [size for part in self._sets for size in part.shard_bytes]

    def deck(self, seed: int, *, purpose: str = "order") -> Deck:
        """Every source in its own order, drawn by its name, and their shares."""
        decks = [part.deck(seed, purpose=f"{purpose}/{name}") for name, part in zip(self._names, self._sets)]
        return Mixture(seed, decks, offsets=[0, *self._ends[:-1]], weights=self._weights)

    def read(self, i: int) -> Record:
        """See `Shards.read`."""
        part, number = self._place(i)
        prefix = f"{self._names[part]}/"
        try:
            record = self._sets[part].read(number)
        except SampleError as error:
            raise SampleError(prefix + error.key, error.reason) from None
        return Record(key=prefix + record.key, image=record.image, caption=record.caption)

    def fetch(self, numbers: Sequence[int]) -> None:
        """See `Shards.fetch`."""
        wanted: dict[int, list[int]] = {}
        for part, number in map(self._place, numbers):
            wanted.setdefault(part, []).append(number)
        for part, own in wanted.items():
            self._sets[part].fetch(own)

    def sizes(self) -> NDArray[np.int32]:
        """See `Shards.sizes`."""
        return np.concatenate([part.sizes() for part in self._sets])

    def write_sidecars(self) -> None:
        """See `Shards.write_sidecars`."""
        for part in self._sets:
            part.write_sidecars()

    def _place(self, i: int) -> tuple[int, int]:
        """Which part sample `i` lies in, and its number there."""
        part = int(np.searchsorted(self._ends, i, side="right"))
        return part, i - int(self._ends[part - 1]) if part else i
