"""One thread for each piece of work, so that no number depends on the cores of a machine or on how many processes share them.

Libraries split a sum over their threads, and another number of threads rounds it differently; torchrun leaves each of its processes
a single one. So every pass of a network, every matrix product and decomposition of an evaluation runs in one thread, and cores are
kept busy by several pieces at once: passes of images, batches of features, blocks of distances. Their sizes are fixed, and results
come in order.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def workers(device: torch.device | None = None) -> int:
    """Pieces of work at a time: one on a GPU, which is busy with one; else a core each, at most OMP_NUM_THREADS."""
    if device is not None and device.type != "cpu":
        return 1
    cores, allowed = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(allowed))) if allowed.isdigit() else cores


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Libraries use a single thread inside, and as many as before behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def in_parallel(work: Callable[[T], R], pieces: Iterable[T], *, device: torch.device | None = None) -> Iterator[R]:
    """`work` on each of the pieces, without gradients, in their order; only a few pieces more than there are workers are in memory.

    What a piece raises is raised here, and the pieces behind it are not begun.
    """

    def one(piece: T) -> R:
        with torch.no_grad():  # of this thread
            return work(piece)

    count = workers(device)
    if count == 1:
        with one_thread_each():
            yield from map(one, pieces)
        return
    pool, begun = ThreadPoolExecutor(count), deque[Future[R]]()
    with one_thread_each():
        try:
            for piece in pieces:
                begun.append(pool.submit(one, piece))
                if len(begun) > count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
