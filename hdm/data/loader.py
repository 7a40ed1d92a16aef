"""Batches: shards, order, crop and caption put together.

Sample i of a run (its record, crop and caption) is a pure function of (run.seed, i); where crops differ in size, also of where
micro-batches begin. Workers only share out the work: each makes whole micro-batches, and they arrive in order, so the stream is the
same for any number of them and from any start.
"""

import atexit
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdm.config.axes import CROP
from hdm.config.errors import DataError
from hdm.config.schema import RunConfig
from hdm.data.captions import draw_caption, full_caption
from hdm.data.crop import Arb, ArbConfig, Crop, Cropped
from hdm.data.deck import permutation
from hdm.data.images import decode
from hdm.data.order import SQUARE
from hdm.data.shards import SampleError, Shards
from hdm.rng import generator

ATTEMPTS = 50
_FIXED = 0  # the seed of validation: the same images and crops whatever the run's seed


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that could not be used and was replaced by another."""

    key: str
    reason: str


@dataclass(kw_only=True, slots=True)
class Batch:
    """B samples.

    pixels in [-1, 1]; view as in docs/architecture.md; aspect = log(width / height) of the whole image; keys: the records' names;
    index: the samples' numbers in the run.
    """

    pixels: Float[Tensor, "B 3 H W"]
    view: Float[Tensor, "B 6"]
    aspect: Float[Tensor, " B"]
    captions: list[str]
    keys: list[str]
    index: list[int]
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, rows: slice) -> "Batch":
        """Some of the samples."""
        return Batch(
            pixels=self.pixels[rows],
            view=self.view[rows],
            aspect=self.aspect[rows],
            captions=self.captions[rows],
            keys=self.keys[rows],
            index=self.index[rows],
        )


def training_batches(
    run: RunConfig, shards: Shards, *, start: int, batch_size: int, origin: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Endless micro-batches of `batch_size` consecutive samples, each of one size; the first begins with sample `start` of the run.

    The data set begins anew, in an order of its own, at sample `origin`, where a stage begins. `part` = (r, R): of every
    micro-batch only the r-th of R equal parts, for process r of R; the micro-batches are the same for any number of them.
    Raises DataError when a shard goes missing, or when 50 records tried for one sample cannot be used.
    """
    samples = _TrainingSamples(run, shards, start=start, batch_size=batch_size, origin=origin)
    share = batch_size // part[1]
    firsts = count(start + part[0] * share, batch_size)
    return _batches(samples, (range(first, first + share) for first in firsts), workers=run.train.workers)


def validation_batches(
    run: RunConfig, shards: Shards, *, samples: int, batch_size: int, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The first `samples` of a fixed order (all if there are fewer), with fixed crops and whole captions, whatever the seed.

    Crops are squares of one size for every variant of the crop: losses and metrics stay comparable. `part` = (r, R): the batches of
    process r of R, as many for each, so that a batch may come up twice; they are the same batches for any R.
    """
    total = min(samples, len(shards))
    ranges = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
    return _batches(_ValidationSamples(run, shards), _dealt(ranges, part), workers=0)


def whole_batches(
    run: RunConfig, shards: Shards, *, samples: int, batch_size: int, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The images of `validation_batches`, whole: each in HDM's bucket of crop.size, whatever the crop. One size a batch."""
    total = min(samples, len(shards))
    whole = _WholeSamples(run, shards, total)
    alike: dict[tuple[int, int] | None, list[int]] = {}
    for sample, box in enumerate(whole.boxes):
        alike.setdefault(box, []).append(sample)
    parts = [same[first : first + batch_size] for same in alike.values() for first in range(0, len(same), batch_size)]
    return _batches(whole, _dealt(parts, part), workers=0)


def _dealt(batches: Sequence[Sequence[int]], part: tuple[int, int]) -> list[Sequence[int]]:
    """Every R-th batch, from the r-th; where the last round is not full, the first batches once more."""
    rank, size = part
    return [batches[i % len(batches)] for i in range(rank, -(-len(batches) // size) * size, size)]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A batch as a worker sends it: bytes through a pipe, a quarter of the floats, and no shared memory to run out of."""

    crops: list[Cropped]
    captions: list[str]
    keys: list[str]
    index: list[int]
    skipped: list[Skipped]

    def batch(self) -> Batch:
        """The same as tensors."""
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in self.crops]))
        return Batch(
            pixels=pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0),
            view=torch.tensor([crop.view for crop in self.crops], dtype=torch.float32),
            aspect=torch.tensor([crop.aspect for crop in self.crops], dtype=torch.float32),
            captions=self.captions,
            keys=self.keys,
            index=self.index,
            skipped=self.skipped,
        )


class _Samples(Dataset[_Cut | DataError]):
    """Makes the batch of some samples; the subclass says what each sample is."""

    def __init__(self, run: RunConfig, shards: Shards) -> None:
        self.run, self.shards = run, shards
        self.crop: Crop = CROP.build(run.crop)

    def candidates(self, sample: int) -> Iterator[int]:
        """The record of a sample, then those to try when it cannot be used."""
        raise NotImplementedError

    def generator(self, purpose: str, sample: int) -> np.random.Generator:
        """The draws of one sample."""
        raise NotImplementedError

    def first(self, sample: int) -> int:
        """The sample with which the micro-batch of `sample` begins, a whole one of all processes."""
        return sample

    def caption(self, text: str, sample: int) -> str:
        """The caption that the model is given."""
        raise NotImplementedError

    def cut(self, image: bytes, sample: int, first: int) -> Cropped:
        """The crop of a sample whose micro-batch begins with sample `first`. Raises DataError for what cannot be decoded."""
        raise NotImplementedError

    def __getitem__(self, samples: Sequence[int]) -> _Cut | DataError:
        """The batch of `samples`. An error is returned, not raised: as a worker's traceback it would lose its one line."""
        skipped: list[Skipped] = []
        try:
            self.shards.fetch([number for i in samples for number in islice(self.candidates(i), 1)])
            first = self.first(samples[0])
            crops, captions, keys = zip(*(self._sample(i, first, skipped) for i in samples))
        except DataError as error:
            return error
        return _Cut(list(crops), list(captions), list(keys), list(samples), skipped)

    def _sample(self, sample: int, first: int, skipped: list[Skipped]) -> tuple[Cropped, str, str]:
        failed: list[Skipped] = []
        for number in islice(self.candidates(sample), ATTEMPTS):
            try:
                record = self.shards.read(number)
            except SampleError as error:
                failed.append(Skipped(error.key, error.reason))
                continue
            try:
                caption = self.caption(record.caption, sample)
                crop = self.cut(record.image, sample, first)
            except DataError as error:
                failed.append(Skipped(record.key, str(error)))
                continue
            skipped.extend(failed)
            return crop, caption, record.key
        raise DataError(
            f"{self.shards.name}: none of {len(failed)} records tried for one sample can be used, the last being {failed[-1].key}:"
            f" {failed[-1].reason}; python -m hdm.prepare data=… --verify checks them all"
        )


class _TrainingSamples(_Samples):
    def __init__(self, run: RunConfig, shards: Shards, *, start: int, batch_size: int, origin: int) -> None:
        super().__init__(run, shards)
        seed = int(generator(run.seed, "order/stage", origin).integers(2**63)) if origin else run.seed
        self.order = self.crop.order(seed, shards, start=start - origin, batch_size=batch_size)
        self.start, self.batch_size, self.origin = start, batch_size, origin

    def first(self, sample: int) -> int:
        return sample - (sample - self.start) % self.batch_size

    def candidates(self, sample: int) -> Iterator[int]:
        place = sample - self.origin
        yield self.order[place]
        yield from (self.order.replacement(place, attempt) for attempt in count(1))

    def generator(self, purpose: str, sample: int) -> np.random.Generator:
        return generator(self.run.seed, purpose, sample)

    def caption(self, text: str, sample: int) -> str:
        return draw_caption(text, self.run.captions, self.generator("caption", sample))

    def cut(self, image: bytes, sample: int, first: int) -> Cropped:
        box, rng = self.order.box(first - self.origin), self.generator("crop", sample)
        source = decode(image, self.crop.covered(box))
        return self.crop(self.crop.augmented(source, rng), rng, box)


class _ValidationSamples(_Samples):
    def __init__(self, run: RunConfig, shards: Shards) -> None:
        super().__init__(run, shards)
        self.crop = CROP.build(replace(run.crop, places=None))  # held-out images are cut alike, whatever crop.places
        self.order = permutation(_FIXED, "validation/order", 0, len(shards))

    def candidates(self, sample: int) -> Iterator[int]:
        return (int(self.order[(sample + attempt) % len(self.order)]) for attempt in range(len(self.order)))

    def generator(self, purpose: str, sample: int) -> np.random.Generator:
        return generator(_FIXED, f"validation/{purpose}", sample)

    def caption(self, text: str, sample: int) -> str:
        return full_caption(text)

    def cut(self, image: bytes, sample: int, first: int) -> Cropped:
        return self.crop(decode(image, self.crop.size), self.generator("crop", sample))


class _WholeSamples(_ValidationSamples):
    def __init__(self, run: RunConfig, shards: Shards, total: int) -> None:
        super().__init__(run, shards)
        cell = run.autoencoder.factor * run.model.patch
        step = -(-ArbConfig(size=run.crop.size).side_step() // cell) * cell
        self.crop = arb = Arb(ArbConfig(size=run.crop.size, step=step))
        buckets, boxes = arb.assigned(shards.sizes()[self.order[:total]])
        self.boxes = [None if bucket == SQUARE else boxes[bucket] for bucket in buckets]

    def cut(self, image: bytes, sample: int, first: int) -> Cropped:
        box = self.boxes[sample]
        return self.crop(decode(image, self.crop.covered(box)), self.generator("crop", sample), box)


def _batches(samples: _Samples, parts: Iterable[Sequence[int]], *, workers: int) -> Iterator[Batch]:
    loader: DataLoader[_Cut | DataError] = DataLoader(
        samples,
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        worker_init_fn=_quiet if workers else None,
        generator=torch.Generator(),  # unused, but without one it would draw from the global generator
    )
    running = [iter(loader)]  # the only reference: dropping it ends the workers
    atexit.register(running.clear)  # at exit the interpreter waits for workers, and they heed no signal
    try:
        while running and (cut := next(running[0], None)) is not None:
            if isinstance(cut, DataError):
                raise cut
            yield cut.batch()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise DataError(f"train.workers={workers}: {reason}; if memory ran out, set fewer workers") from None
    finally:
        running.clear()
        atexit.unregister(running.clear)


def _quiet(worker: int) -> None:  # noqa: ARG001
    """Leave signals to the main process: it saves and stops first, and a worker that died before would stop it from saving."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
