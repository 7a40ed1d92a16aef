import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from hdm.config.errors import LostProcess, TrainingError
from hdm.train.loop import train
from hdm.train.signals import StopRequest


class Pulling:
    """Sends this process a signal when `samples` have been logged."""

    def __init__(self, listener, samples, *numbers):
        self.listener, self.samples, self.numbers = listener, samples, numbers

    def __getattr__(self, name):
        return getattr(self.listener, name)

    def metrics(self, values, samples):
        self.listener.metrics(values, samples)
        if samples == self.samples and "train/loss" in values:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_the_same_command_goes_on(nano, listener, tmp_path, capfd, number):
    run = nano("budget.steps=8", "train.workers=1")
    straight = train(run, tmp_path / "straight", listener)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = train(run, tmp_path / "run", Pulling(listener, 16, number))
    assert (stopped.status, stopped.samples) == ("interrupted", 16)
    assert stopped.checkpoint.name == "samples-000000016"
    assert "stopping after this step" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = train(run, tmp_path / "run", listener)
    assert (resumed.status, resumed.samples) == ("finished", 32)
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        a, b = (load_file(result.checkpoint / f"{stem}.safetensors") for result in (straight, resumed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_interrupt_leaves_at_once(nano, listener, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(nano("budget.steps=8"), tmp_path / "run", Pulling(listener, 16, signal.SIGINT, signal.SIGINT))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["samples-000000000"]


def test_two_sigterms_still_save():
    """A scheduler that asks twice is not a person in a hurry."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_forked_workers_end_at_sigterm_and_ignore_sigint(number, ends):
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (128 + number if ends else 0)
    assert not stop.requested


def test_who_lost_another_process_says_so_before_a_launcher_ends_it():
    """torchrun sends SIGTERM to the others at once; what they know must reach the terminal and the tracker."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(LostProcess), StopRequest():
            raise LostProcess("another process of this run is gone")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(TrainingError), StopRequest():
        raise TrainingError("the loss is not finite")
    assert signal.getsignal(signal.SIGTERM) == before
