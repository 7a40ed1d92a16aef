"""How captions of different lengths share the rows of a batch. A row is a list of (caption, first column)."""

from collections.abc import Sequence
from typing import TypeAlias

Row: TypeAlias = list[tuple[int, int]]


def padded(lengths: Sequence[int]) -> list[Row]:
    """One caption a row, from the shortest to the longest, so that neighbours need little padding."""
    return [[(caption, 0)] for caption in sorted(range(len(lengths)), key=lengths.__getitem__)]


def packed(lengths: Sequence[int]) -> list[Row]:
    """Rows no longer than the longest caption, each caption in the first row that has room, longest first.

    First fit decreasing: at most 11/9 of the fewest rows possible, plus one (Dósa, 2007). Attention costs what the row's length
    squared costs, so rows longer than the longest caption would save nothing.
    """
    room: list[int] = []
    rows: list[Row] = []
    longest = max(lengths, default=0)
    for caption in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[caption]
        row = next((i for i, free in enumerate(room) if free >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(longest)
        rows[row].append((caption, longest - room[row]))
        room[row] -= need
    return rows
