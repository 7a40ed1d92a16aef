"""What is best when several things count."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point, whether no other one is at least as good in everything and better in something. Less is better.

    A point with a value that is not finite is on no front.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return []
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    others = values[finite]
    front = [False] * len(values)
    for number in np.flatnonzero(finite):
        row = values[number]
        front[number] = not bool(((others <= row).all(axis=1) & (others < row).any(axis=1)).any())
    return front
