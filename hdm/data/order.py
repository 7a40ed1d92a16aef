"""Which record each sample of a run is: arithmetic, so a run can start anywhere.

A deck (`hdm.data.deck`) lays the records out as an endless row; for a plain data set that is one permutation an epoch.

A crop whose batches differ in size also decides here which samples share a micro-batch. Micro-batches begin at the samples that
differ from the run's start by a multiple of their length, so a run that goes on after whole steps finds the same ones.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hdm.config.errors import DataError
from hdm.data.deck import Deck, Shuffled, permutation
from hdm.rng import generator

SQUARE = -1  # the bucket of images that have none, and of what full micro-batches leave over
_ALIKE = 25  # stand-ins that are looked for in the sample's own bucket, before any record will do


class Order:
    """The records of a data set of `size`, in the order of `deck`; by default a new permutation every epoch."""

    def __init__(self, seed: int, size: int, *, deck: Deck | None = None) -> None:
        self._seed, self._records = seed, size
        self._deck = deck or Shuffled(seed, size)
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, sample: int) -> int:
        """The record that sample `sample` of the run is."""
        place = self._place(sample)  # arranges the epoch
        return int(self._permutation[place])

    def box(self, first: int) -> tuple[int, int] | None:
        """(height, width) of the crops of the micro-batch that begins with sample `first`; None: the square of the crop."""
        return None

    def replacement(self, sample: int, attempt: int) -> int:
        """The record that stands in for an unusable one: any, drawn from the sample's own number and the attempt."""
        return int(self._stand_in(sample, attempt, self._records))

    def _stand_in(self, sample: int, attempt: int, size: int) -> int:
        return int(generator(self._seed, "order/replacement", f"{sample}/{attempt}").integers(size))

    def _place(self, sample: int) -> int:
        """Where in its part of the deck, an epoch, a sample lies; the part is arranged when it is not yet."""
        epoch, place = divmod(sample, self._deck.length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._arrange(epoch)
        return place

    def _arrange(self, epoch: int) -> None:
        self._permutation = self._deck.part(epoch)


class DrawnOrder(Order):
    """The plain order; each micro-batch draws one of `boxes` with the probabilities `shares`, from (seed, its first sample)."""

    def __init__(
        self, seed: int, size: int, *, boxes: Sequence[tuple[int, int]], shares: Sequence[float], deck: Deck | None = None
    ) -> None:
        super().__init__(seed, size, deck=deck)
        self._boxes, self._limits = list(boxes), np.cumsum(shares)[:-1]

    def box(self, first: int) -> tuple[int, int]:
        """See `Order.box`."""
        draw = generator(self._seed, "crop/box", first).random()
        return self._boxes[int(np.searchsorted(self._limits, draw, side="right"))]


class BucketOrder(Order):
    """The records of each part of the deck, an epoch, in micro-batches of one bucket each; `boxes` are their (height, width).

    An epoch is dealt into buckets. Whole micro-batches of each bucket come out; what is left over, and records of no
    bucket (SQUARE), make micro-batches of squares. So do the first and the last samples of an epoch where a micro-batch reaches
    over its ends. The micro-batches are shuffled.
    """

    def __init__(
        self,
        seed: int,
        buckets: NDArray[np.int64],
        *,
        boxes: Sequence[tuple[int, int]],
        start: int,
        batch_size: int,
        deck: Deck | None = None,
    ) -> None:
        super().__init__(seed, len(buckets), deck=deck)
        self._buckets, self._boxes = buckets, list(boxes)
        self._start, self._batch = start, batch_size
        self._dealt = np.empty(0, np.int64)

    def box(self, first: int) -> tuple[int, int] | None:
        """See `Order.box`."""
        bucket = self._bucket(first)
        return None if bucket == SQUARE else self._boxes[bucket]

    def replacement(self, sample: int, attempt: int) -> int:
        """See `Order.replacement`; at first one of the same bucket, which its box cuts least."""
        bucket = self._bucket(sample)
        if bucket == SQUARE or attempt > _ALIKE:
            return super().replacement(sample, attempt)
        alike = np.flatnonzero(self._buckets == bucket)
        return int(alike[self._stand_in(sample, attempt, len(alike))])

    def _bucket(self, sample: int) -> int:
        place = self._place(sample)
        return int(self._dealt[place])

    def _arrange(self, epoch: int) -> None:
        records = self._deck.part(epoch)
        head = (self._start - epoch * len(records)) % self._batch
        shuffle = generator(self._seed, "order/batches", epoch)
        places, self._dealt = deal(self._buckets[records], head=min(head, len(records)), batch=self._batch, shuffle=shuffle)
        self._permutation = records[places]


class CycledOrder(BucketOrder):
    """Micro-batches cycle through the buckets of `fewest` records or more: each once a cycle, in an order drawn for the cycle.

    A bucket is an endless row of its own, dealt as the data set is (`dealt` makes the deck of a seed), so that its images come
    round once before one comes again; those of a small bucket come more often. Cycle c takes the c-th micro-batch of each.
    Raises DataError when no bucket has so many records.
    """

    def __init__(
        self,
        seed: int,
        buckets: NDArray[np.int64],
        *,
        boxes: Sequence[tuple[int, int]],
        start: int,
        batch_size: int,
        fewest: int,
        dealt: Callable[[int], Deck],
    ) -> None:
        super().__init__(seed, buckets, boxes=boxes, start=start, batch_size=batch_size)
        counts = np.bincount(buckets[buckets != SQUARE], minlength=1)
        self._cycle = np.flatnonzero(counts >= fewest)
        if not len(self._cycle):
            raise DataError(
                f"crop.balanced={fewest}: no bucket has so many images, the fullest has {counts.max()}; set"
                f" crop.balanced={max(counts.max() // 2, 1)}, or crop.balanced=null"
            )
        self._rows: dict[int, Order] = {}
        for bucket in map(int, self._cycle):
            height, width = boxes[bucket]
            own = int(generator(seed, "order/bucket", f"{width}x{height}").integers(2**63))
            self._rows[bucket] = Order(own, len(buckets), deck=dealt(own).chosen(buckets == bucket))

    def __getitem__(self, sample: int) -> int:
        """See `Order.__getitem__`."""
        cycle, bucket, place = self._turn(sample)
        return self._rows[bucket][cycle * self._batch + place]

    def _bucket(self, sample: int) -> int:
        return self._turn(sample)[1]

    def _turn(self, sample: int) -> tuple[int, int, int]:
        """The cycle and bucket of a sample's micro-batch, and its place there."""
        number, place = divmod(sample - self._start % self._batch, self._batch)
        cycle, turn = divmod(number, len(self._cycle))
        return cycle, int(self._cycle[permutation(self._seed, "order/cycle", cycle, len(self._cycle))[turn]]), place


def deal(
    buckets: NDArray[np.int64], *, head: int, batch: int, shuffle: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rearrange an epoch so that, behind its first `head` records, every `batch` share one bucket.

    Returns the places of the records in their new order, and the bucket that each is used in. The first `head` and the last
    records, fewer than `batch`, are squares.
    """
    tail = (len(buckets) - head) % batch
    places = np.argsort(buckets, kind="stable")
    groups, starts, counts = np.unique(buckets[places], return_index=True, return_counts=True)
    rank = np.arange(len(buckets)) - np.repeat(starts, counts)
    whole = (rank < np.repeat(counts // batch * batch, counts)) & np.repeat(groups != SQUARE, counts)
    full, rest = places[whole].reshape(-1, batch), places[~whole]
    if len(rest) < head + tail:  # both ends need squares: one micro-batch is given up for them
        given = shuffle.integers(len(full))
        full, rest = np.delete(full, given, axis=0), np.concatenate([rest, full[given]])
    rest.sort()
    first, middle, last = np.split(rest, [head, len(rest) - tail])
    chunks = np.concatenate([full, middle.reshape(-1, batch)])
    used = np.concatenate([buckets[full[:, 0]], np.full(len(chunks) - len(full), SQUARE)])
    turn = shuffle.permutation(len(chunks))
    ends = np.full(head, SQUARE), np.full(tail, SQUARE)
    return np.concatenate([first, chunks[turn].ravel(), last]), np.concatenate([ends[0], np.repeat(used[turn], batch), ends[1]])
