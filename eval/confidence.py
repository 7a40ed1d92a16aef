"""Sampling error: how much a number would move if other images were drawn, by the bootstrap over the generated images.

It says nothing of another training: the spread over training seeds is a question of its own, and usually the larger one.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eval.threads import in_parallel
from hdm import rng

Array = NDArray[np.float64]


def weights(samples: int, rounds: int) -> Array:
    """How often each of `samples` is drawn in each of `rounds` bootstrap samples, (rounds, samples); the same every time."""
    draw = rng.generator(0, "eval/bootstrap", samples)
    return np.asarray(draw.multinomial(samples, np.full(samples, 1.0 / samples), size=rounds), dtype=np.float64)


def error_of_mean(values: Array, drawn: Array) -> float:
    """Standard error of the mean of `values` (n,) over bootstrap weights (B, n)."""
    return float(np.std(drawn @ values / drawn.sum(axis=1), ddof=1))


def error_of(statistic: Callable[[NDArray[np.int64]], float], drawn: Array) -> float:
    """Standard error of a statistic of row numbers, evaluated for each bootstrap sample."""
    rows = np.arange(drawn.shape[1])
    return float(np.std(list(in_parallel(lambda draw: statistic(np.repeat(rows, draw.astype(int))), drawn)), ddof=1))
