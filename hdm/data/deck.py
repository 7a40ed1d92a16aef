"""Decks: the endless row of records that a run is dealt, before crops decide what shares a micro-batch.

A deck is laid out in parts of one length. Part k is a pure function of (seed, k), so a run can start at any sample. For a plain
data set a part is an epoch: a permutation of all its records. Two other layouts are here: shards shuffled in windows, so that few
of them are in use at a time, and a mixture of several decks in given shares.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hdm.rng import generator

_BLOCK = 4096  # samples over which the shares of a mixture are kept exactly
_PART = 1 << 20  # longest part of a mixture


class Deck(ABC):
    """Records in the order in which a run sees them."""

    length: int  # of a part

    @abstractmethod
    def part(self, number: int) -> NDArray[np.int64]:
        """The records of samples `number` x `length` and on."""

    def span(self, first: int, count: int) -> NDArray[np.int64]:
        """The records of `count` samples from sample `first` on."""
        parts = range(first // self.length, (first + max(count, 1) - 1) // self.length + 1)
        start = first - parts[0] * self.length
        return np.concatenate([self.part(number) for number in parts])[start : start + count]

    @abstractmethod
    def chosen(self, kept: NDArray[np.bool_]) -> "Deck":
        """A deck of the same law with the records where `kept` is true alone, under their numbers here; there must be one."""


class Shuffled(Deck):
    """A permutation of all records every epoch."""

    def __init__(self, seed: int, size: int, *, purpose: str = "order") -> None:
        self.length, self._seed, self._purpose = size, seed, purpose

    def part(self, number: int) -> NDArray[np.int64]:
        """See `Deck.part`."""
        return permutation(self._seed, self._purpose, number, self.length)

    def chosen(self, kept: NDArray[np.bool_]) -> Deck:
        """See `Deck.chosen`."""
        return _Chosen(Shuffled(self._seed, int(kept.sum()), purpose=self._purpose), np.flatnonzero(kept))


class Windowed(Deck):
    """A permutation of all records every epoch that uses few shards at a time: `window` of them, then the next.

    Shards are shuffled and cut into windows; the records of a window are shuffled. `ends` are the shards' last records + 1.
    """

    def __init__(self, seed: int, ends: NDArray[np.int64], *, window: int, purpose: str = "order") -> None:
        self.length, self._seed, self._purpose = int(ends[-1]), seed, purpose
        self._starts, self._ends, self._window = np.concatenate([[0], ends[:-1]]), ends, window

    def part(self, number: int) -> NDArray[np.int64]:
        """See `Deck.part`."""
        shards = permutation(self._seed, f"{self._purpose}/shards", number, len(self._ends))
        rng = generator(self._seed, self._purpose, number)
        windows = []
        for first in range(0, len(shards), self._window):
            records = [np.arange(self._starts[s], self._ends[s]) for s in shards[first : first + self._window]]
            windows.append(rng.permutation(np.concatenate(records)))
        return np.concatenate(windows)

    def chosen(self, kept: NDArray[np.bool_]) -> Deck:
        """See `Deck.chosen`: of the same windows' laws, over shards that have become shorter."""
        ends = np.concatenate([[0], np.cumsum(kept)])[self._ends]
        return _Chosen(Windowed(self._seed, ends, window=self._window, purpose=self._purpose), np.flatnonzero(kept))


class Mixture(Deck):
    """Several decks in given shares; the records of deck k are numbered from `offsets[k]` on.

    Of the first n samples deck k has its share of n, to within the number of decks, whenever n is a multiple of 4,096; inside such
    a block the decks follow each other at random. Each deck is walked in its own order, so that its own epochs stay permutations.
    """

    def __init__(self, seed: int, decks: Sequence[Deck], *, offsets: Sequence[int], weights: Sequence[float]) -> None:
        self._seed, self._decks, self._offsets, self._weights = seed, list(decks), list(offsets), list(weights)
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]  # of what the decks before leave over
        self.length = min(max(sum(deck.length for deck in decks), _BLOCK), _PART)

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples`, a multiple of the block, each deck has."""
        left, found = samples, []
        for share in self._shares:
            found.append(left * share.numerator // share.denominator)
            left -= found[-1]
        return found

    def part(self, number: int) -> NDArray[np.int64]:
        """See `Deck.part`."""
        first, last = number * self.length, (number + 1) * self.length
        blocks = range(first // _BLOCK, (last - 1) // _BLOCK + 1)
        owners = np.concatenate([self._owners(block) for block in blocks])
        begin = self.counts(blocks[0] * _BLOCK)
        records = np.empty(len(owners), np.int64)
        for k, deck in enumerate(self._decks):
            mine = owners == k
            records[mine] = deck.span(begin[k], int(mine.sum())) + self._offsets[k]
        start = first - blocks[0] * _BLOCK
        return records[start : start + self.length]

    def chosen(self, kept: NDArray[np.bool_]) -> Deck:
        """See `Deck.chosen`; decks of which nothing is left leave their share to the others."""
        own = np.split(kept, self._offsets[1:])
        left = [k for k, part in enumerate(own) if part.any()]
        decks = [self._decks[k].chosen(own[k]) for k in left]
        weights = [self._weights[k] for k in left]
        return Mixture(self._seed, decks, offsets=[self._offsets[k] for k in left], weights=weights)

    def _owners(self, block: int) -> NDArray[np.int64]:
        """Which deck each sample of a block comes from."""
        before, behind = self.counts(block * _BLOCK), self.counts((block + 1) * _BLOCK)
        owners = np.repeat(np.arange(len(before)), np.subtract(behind, before))
        return generator(self._seed, "order/sources", block).permutation(owners)


class _Chosen(Deck):
    """Some records of a data set: `deck` deals their numbers among themselves."""

    def __init__(self, deck: Deck, records: NDArray[np.int64]) -> None:
        self._deck, self.length, self._records = deck, deck.length, records

    def part(self, number: int) -> NDArray[np.int64]:
        """See `Deck.part`."""
        return self._records[self._deck.part(number)]

    def chosen(self, kept: NDArray[np.bool_]) -> Deck:
        """See `Deck.chosen`."""
        return _Chosen(self._deck.chosen(kept[self._records]), self._records)


def permutation(seed: int, purpose: str, key: int, size: int) -> NDArray[np.int64]:
    """The numbers below `size` in random order."""
    return generator(seed, purpose, key).permutation(size)
