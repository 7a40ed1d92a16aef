"""Arms as processes of this machine, through submitit."""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdm.launch.job import ArmJob
from hdm.launch.launcher import Result, shown
from hdm.track.environment import gpus


class LocalJob:
    """An arm in processes of this machine."""

    def __init__(self, job: Any) -> None:
        self._job, self._first = job, job.task(0)
        self.log = shown(Path(self._first.paths.stdout))

    def done(self) -> bool:
        """Whether the processes have ended."""
        return bool(self._job.done())

    def result(self) -> Result:
        """What the first process returned; one that died without a word failed."""
        if not self._first.paths.result_pickle.exists():
            return {"status": "failed", "reason": "the process died without a word (killed, or out of memory?)"}
        error = self._first.exception()
        if error is not None:
            return {"status": "failed", "reason": " ".join(str(error).split())[-200:]}
        return dict(self._first.result())

    def stop(self) -> None:
        """Ask the processes to save and leave."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._job.job_id), signal.SIGTERM)  # the controller, which passes it on

    def record(self) -> None:
        """Processes are not found again: numbers of processes come again."""


class LocalLauncher:
    """At most `parallel` arms at once, by default one per GPU, one without; each of `tasks` processes has a GPU and its cores."""

    def __init__(self, folder: Path, parallel: int | None, *, tasks: int = 1) -> None:
        # submitit names files by process id, and these come again
        self.folder, self.tasks = folder / time.strftime("%Y%m%d-%H%M%S"), tasks
        self._devices = visible_gpus()
        self.parallel = parallel or max(1, len(self._devices) // tasks)
        self._slots: dict[int, LocalJob] = {}

    def close(self) -> None:
        """Let go of the jobs. They are part of reference cycles, and submitit's `__del__` fails when the interpreter shuts down."""
        self._slots.clear()
        gc.collect()

    def room(self) -> int:
        """How many arms may be started now."""
        self._slots = {slot: job for slot, job in self._slots.items() if not job.done()}
        return self.parallel - len(self._slots)

    def submit(self, arms: Sequence[ArmJob]) -> list[LocalJob]:
        """Start each arm in processes of its own."""
        return [self._start(arm) for arm in arms]

    def attach(self, record: dict[str, Any]) -> None:
        """Nothing: an arm that an earlier launcher left running holds its folder's lock, for which the new process waits."""

    def _start(self, arm: ArmJob) -> LocalJob:
        import submitit

        slot = next(n for n in range(self.parallel) if n not in self._slots)
        arm.environment = {**arm.environment, **self._environment(slot)}
        executor = submitit.AutoExecutor(folder=self.folder, cluster="local")
        executor.update_parameters(timeout_min=10**6, stderr_to_stdout=True, tasks_per_node=self.tasks)
        # submitit's controller must outlive Ctrl-C, which the terminal sends to it too: it would kill the arm within a second
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job = LocalJob(executor.submit(arm))
        finally:
            signal.signal(signal.SIGINT, handler)
        self._slots[slot] = job
        return job

    def _environment(self, slot: int) -> dict[str, str]:
        values, processes = {}, self.parallel * self.tasks
        if self._devices:
            mine = [self._devices[(slot * self.tasks + n) % len(self._devices)] for n in range(self.tasks)]
            values["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            values["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
        return values


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [gpu["index"] for gpu in gpus()]
