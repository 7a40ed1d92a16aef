"""One arm in a process of its own, started by a launcher: on this machine or on a cluster, by itself or as one of several ranks."""

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hdm.config.compose import DEFAULT_EXPERIMENT, compose
from hdm.config.errors import HdmError
from hdm.files import locked
from hdm.launch.arm import mark
from hdm.model.match import matched


@dataclass(kw_only=True, slots=True)
class ArmJob:
    """What a launcher submits; calling it executes the arm.

    It returns {"status": "finished" | "interrupted" | "failed", "reason": one line}; what the arm measured is in the run folder.
    SIGINT and SIGTERM interrupt it: in training it saves first. So does SIGUSR2, which Slurm sends before it takes the node away;
    then the job queues again, and the run folder's checkpoint is what it goes on from.
    """

    overrides: Sequence[str]
    folder: str
    sweep: str
    setting: str
    environment: Mapping[str, str]

    def __call__(self) -> dict[str, Any]:
        """Execute the arm."""
        os.environ.update(self.environment)
        rank = _join()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        with Preemption() as preemption:
            result = self._execute(rank)
            if result["status"] == "interrupted" and preemption.came():
                preemption.requeue(rank)
        return result

    def checkpoint(self) -> Any:
        """What submitit puts in the place of a job that queues again: the same."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)

    def _execute(self, rank: int) -> dict[str, Any]:
        from hdm.run import execute

        folder = Path(self.folder)
        try:
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                wait_for(folder)
                mark(folder, self.sweep, setting=self.setting)
            outcome = execute(matched(compose(self.overrides, default_experiment=DEFAULT_EXPERIMENT)))
        except KeyboardInterrupt:
            return {"status": "interrupted", "reason": ""}
        except HdmError as error:
            print(f"error: {error}", flush=True)
            return {"status": "failed", "reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return {"status": outcome.status, "reason": ""}


class Preemption:
    """A context in which SIGUSR2 means SIGTERM, and is remembered, whoever else handles it meanwhile."""

    def __enter__(self) -> "Preemption":
        self._owner = os.getpid()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # every signal leaves its number there
        self._submitit = signal.signal(signal.SIGUSR2, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGUSR2, self._submitit)
        os.close(self._read)
        os.close(self._write)

    def came(self) -> bool:
        """Whether SIGUSR2 was received."""
        try:
            return signal.SIGUSR2 in os.read(self._read, 65536)
        except BlockingIOError:
            return False

    def requeue(self, rank: int) -> None:
        """Let submitit queue the job again, and leave without a result. One rank does that for all."""
        if rank == 0 and callable(self._submitit):
            self._submitit(signal.SIGUSR2, None)
        sys.exit(0)

    def _pass_on(self, _number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._owner:  # and not in a data worker that was forked meanwhile
            os.kill(self._owner, signal.SIGTERM)


def wait_for(folder: Path) -> None:
    """Return when no process works in the run folder: a launcher that was killed leaves its arms running."""
    with locked(folder / "lock"):
        pass


def _join() -> int:
    """Take the place among the job's processes that submitit assigned, in torchrun's words (RANK …); return the rank."""
    import submitit

    here = submitit.JobEnvironment()
    if here.cluster == "local":
        os.setsid()  # Ctrl-C in the launcher's terminal goes to the launcher, which tells the arms
    if here.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return int(here.global_rank)
