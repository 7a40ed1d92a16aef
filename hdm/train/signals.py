"""Ctrl-C, SIGTERM and a scheduler's SIGUSR2: finish the step, save, leave. A second Ctrl-C leaves at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hdm.config.errors import LostProcess


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR2 set `requested` instead of ending the process.

    Slurm announces a time limit or a preemption by SIGUSR2 where it is asked to.

    Data workers that are forked inside inherit the handlers; there SIGINT is ignored (the terminal sends it to all, and the parent
    decides) and SIGTERM ends the worker as ever.

    When a LostProcess leaves the context SIGTERM stays ignored: torchrun and srun send it to the others as soon as one process is
    gone, and these have to say so first, on the terminal and in the tracker. Both follow it with SIGKILL.
    """

    def __init__(self) -> None:
        self.requested = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and isinstance(error, LostProcess):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once, without saving\n")
