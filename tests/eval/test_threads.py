"""One thread for each piece of work: in order, without more in memory than is worked on, and nothing left behind."""

import threading
import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from eval import threads
from eval.threads import in_parallel, one_thread_each


@pytest.fixture(params=[1, 3])
def workers(request, monkeypatch):
    monkeypatch.setattr(threads, "workers", lambda device=None: request.param)
    return request.param


@pytest.fixture(autouse=True)
def two_threads():
    """Before and after each test, so that one is a change."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(limits=2):
        yield
        assert torch.get_num_threads() == 2
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {2}
    torch.set_num_threads(before)


def test_every_piece_has_one_thread_and_no_gradients(workers):
    def work(piece):
        np.ones((4, 4)) @ np.ones((4, 4))
        blas = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
        return piece, torch.get_num_threads(), blas, torch.is_grad_enabled(), threading.get_ident()

    found = list(in_parallel(work, range(20)))
    assert [piece for piece, *_ in found] == list(range(20))
    assert {(count, *blas, grad) for _, count, blas, grad, _ in found} == {(1, 1, False)}
    assert (len({thread for *_, thread in found}) > 1) == (workers > 1)


def test_results_come_in_order_whichever_is_done_first(workers):
    assert list(in_parallel(lambda piece: time.sleep(0.02 * (3 - piece % 4)) or piece, range(9))) == list(range(9))


def test_pieces_are_taken_as_they_are_needed(workers):
    """A reference of 50,000 images is not read into memory to wait for its turn."""
    taken, done = [], []
    pieces = (taken.append(piece) or piece for piece in range(50))
    for result in in_parallel(lambda piece: piece, pieces):
        done.append(result)
        assert len(taken) <= len(done) + workers + 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_piece_raises_ends_the_work(workers, error):
    begun = []

    def work(piece):
        begun.append(piece)
        if piece == 4:
            raise error("here")
        return piece

    with pytest.raises(error, match="here"):
        list(in_parallel(work, range(100)))
    assert set(begun) <= set(range(4 + 2 * workers + 1))


def test_sums_do_not_depend_on_the_threads_there_were():
    x = torch.randn(300, 4000, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with one_thread_each():
            found.append((x @ x.T, x.numpy().T @ x.numpy(), torch.linalg.svdvals(x.double())))
    torch.set_num_threads(2)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_workers_are_cores_at_most_what_is_allowed_and_one_on_a_gpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for allowed, expected in (("", 6), ("4", 4), ("9", 6), ("1", 1), ("0", 1), ("4,2", 6)):
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
        assert threads.workers() == expected, allowed
        assert threads.workers(torch.device("cpu")) == expected
    assert threads.workers(torch.device("cuda")) == 1
