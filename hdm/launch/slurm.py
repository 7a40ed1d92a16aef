"""Arms as jobs of a Slurm cluster, through submitit: arrays, requeue, and jobs found again by another launcher.

Slurm announces a preemption, or the time limit, by SIGUSR2; the arm saves and queues again (`hdm.launch.job`). submitit asks sacct
how jobs are; a cluster without accounting has none, and a killed job would be asked about for ever. There squeue is asked.
"""

import gc
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from hdm.config.errors import ConfigError, HdmError
from hdm.launch.job import ArmJob
from hdm.launch.launcher import Result, shown
from hdm.launch.options import LauncherOptions

_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "GONE")
_SETTLED = 60.0  # seconds after which Slurm has noticed that a process left
_TOO_LARGE = 10**6


class ClusterJob:
    """An arm in the queue of the cluster or on its nodes."""

    def __init__(self, job: submitit.Job[Result], options: LauncherOptions) -> None:
        self._job, self._first, self._options = job, job.task(0), options
        self.log = shown(Path(self._first.paths.stdout))
        self._stopped = False

    def done(self) -> bool:
        """Whether the job has left its result, or Slurm says that it ended.

        A job that was interrupted, and not by this launcher, may have been cancelled, or queued again by Slurm: that shows later.
        """
        if not self._first.done():
            return False
        if self._stopped or not self._interrupted():
            return True
        path, state = self._first.paths.result_pickle, self._job.watcher.get_state(self._job.job_id).split()[0]
        if state == "PENDING" or (state == "RUNNING" and time.time() - path.stat().st_mtime > _SETTLED):
            path.unlink()  # what it left before it was queued again
        return state in _ENDED

    def result(self) -> Result:
        """What the first process returned, else what Slurm says."""
        if (path := self._first.paths.result_pickle).exists() or _appears(path, self._state()):
            error = self._first.exception()
            if error is not None:
                return {"status": "failed", "reason": " ".join(str(error).split())[-200:]}
            result = dict(self._first.result())
            if result["status"] != "interrupted" or self._stopped or self._state() != "CANCELLED":
                return result
        state = self._state()
        errors = _errors(self.log)
        if self._stopped or (errors and "User defined signal 2" in errors[-1]):  # it was told to leave before it could listen
            return {"status": "interrupted", "reason": ""}
        words = f" ({errors[0]})" if errors else ""
        return {"status": "failed", "reason": f"Slurm job {self._job.job_id}: {state}{self._hint(state, words)}{words}"}

    def stop(self) -> None:
        """Take it out of the queue, or ask it to save and leave."""
        self._stopped = True
        _slurm("scancel", "--state=PENDING", self._job.job_id)
        _slurm("scancel", "--signal=TERM", self._job.job_id)

    def record(self) -> dict[str, Any]:
        """What finds it again."""
        return {"job_id": self._job.job_id, "folder": str(self._folder), "tasks": self._job.num_tasks}

    def _interrupted(self) -> bool:
        path = self._first.paths.result_pickle
        return path.exists() and self._first.exception() is None and self._first.result()["status"] == "interrupted"

    @property
    def _folder(self) -> Path:
        return Path(self._first.paths._folder)

    def _state(self) -> str:
        return self._job.watcher.get_state(self._job.job_id, mode="cache").split()[0]

    def _hint(self, state: str, words: str) -> str:
        if state == "OUT_OF_MEMORY" or re.search(r"memory|oom", words, re.IGNORECASE):
            return ", it took more memory than it was given; raise launcher.memory_gb or train.accumulation"
        hints = {
            "TIMEOUT": f"; {self._options.grace} s were not enough to save, raise launcher.grace or launcher.minutes",
            "CANCELLED": " by somebody",
            "GONE": ", the cluster does not know it any more and it left no result",
        }
        return hints.get(state, "")


class SlurmLauncher:
    """Arms as one array of jobs, `parallel` of them at once, or as many as the cluster gives."""

    def __init__(self, folder: Path, parallel: int | None, *, options: LauncherOptions, name: str) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm: there is no sbatch here; start the sweep on a login node of the cluster, or launcher=local"
            )
        settings = cluster_settings()
        self.folder, self.parallel, self.options, self.name = folder.absolute(), parallel, options, name
        self._largest = int(settings.get("MaxArraySize", "1001")) - 1
        accounting = "slurmdbd" in settings.get("AccountingStorageType", "")
        SlurmJob.watcher = (AccountingWatcher if accounting else QueueWatcher)(delay_s=options.poll)

    def room(self) -> int:
        """The queue takes everything; Slurm sees to how many run at once."""
        return _TOO_LARGE

    def submit(self, arms: Sequence[ArmJob]) -> list[ClusterJob]:
        """Queue the arms, as arrays where there are several. Raises HdmError when the cluster does not take them."""
        jobs: list[ClusterJob] = []
        executor = self._executor()
        for start in range(0, len(arms), self._largest):
            try:
                with executor.batch():
                    submitted = [executor.submit(arm) for arm in arms[start : start + self._largest]]
            except Exception as error:
                raise HdmError(f"launcher=slurm: {_why(error)}; see to it and give the same command again") from None
            jobs += [ClusterJob(job, self.options) for job in submitted]
        return jobs

    def attach(self, record: dict[str, Any]) -> ClusterJob:
        """The job of an earlier launcher."""
        job: SlurmJob[Result] = SlurmJob(record["folder"], record["job_id"], tasks=list(range(record["tasks"])))
        return ClusterJob(job, self.options)

    def close(self) -> None:
        """The jobs go on."""
        gc.collect()

    def _executor(self) -> SlurmExecutor:
        o = self.options
        executor = SlurmExecutor(folder=self.folder, max_num_timeout=_TOO_LARGE)
        given = {
            "partition": o.partition, "account": o.account, "qos": o.qos, "constraint": o.constraint, "cpus_per_task": o.cpus,
            "gpus_per_node": o.gpus or None, "mem": None if o.memory_gb is None else f"{round(o.memory_gb * 1024)}MB",
            "setup": o.setup or None,
        }  # fmt: skip
        executor.update_parameters(
            job_name=re.sub(r"[^\w.-]", "_", self.name)[:60],
            time=o.minutes,
            nodes=o.nodes,
            ntasks_per_node=o.tasks,
            signal_delay_s=o.grace,
            stderr_to_stdout=True,
            array_parallelism=self.parallel or _TOO_LARGE,
            additional_parameters={"requeue": True},
            **{key: value for key, value in given.items() if value is not None},
        )
        return executor


class AccountingWatcher(SlurmInfoWatcher):
    """How jobs are, from sacct. A job has ended when Slurm says so, not when its state is one that submitit does not know."""

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has ended."""
        return self.get_state(job_id, mode=mode).split()[0] in _ENDED


class QueueWatcher(AccountingWatcher):
    """How jobs are, from squeue, which knows them until some minutes after their end (Slurm's MinJobAge)."""

    def _make_command(self) -> list[str] | None:
        wanted = sorted({job.split("_")[0] for job in self._registered - self._finished})
        return (
            ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N", "--jobs", ",".join(wanted)] if wanted else None
        )

    def update(self) -> None:
        """Ask for all jobs at once. A job that squeue does not know any more is gone; without an answer nothing changes."""
        command = self._make_command()
        if command is None:
            return
        self._num_calls += 1
        self._last_status_check = time.time()
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return
        known = self.read_info("JobID|State|NodeList\n" + answer.stdout)
        for job in self._registered - self._finished:
            self._info_dict[job] = known.get(job, {"JobID": job, "State": "GONE", "NodeList": ""})
            if self.is_done(job, mode="cache"):
                self._finished.add(job)


def cluster_settings() -> dict[str, str]:
    """The configuration of the cluster. Raises HdmError when its controller does not answer."""
    answer = _slurm("scontrol", "show", "config")
    if answer.returncode:
        raise HdmError(
            f"launcher=slurm: the cluster does not answer: {' '.join(answer.stderr.split())}; is SLURM_CONF right, is slurmctld up?"
        )
    return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", answer.stdout, re.MULTILINE))


def _slurm(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _errors(log: Path) -> list[str]:
    """What Slurm wrote into the log of a job that it ended."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace")[-10_000:].splitlines()
    except OSError:
        return []
    return [" ".join(line.split())[:200] for line in lines if re.match(r"(slurmstepd|srun|slurmd).*: error", line)]


def _appears(path: Path, state: str) -> bool:
    """Whether the result of a job that completed shows up, on a file system that is slow to."""
    deadline = time.monotonic() + (10 if state == "COMPLETED" else 1)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.exists()


def _why(error: Exception) -> str:
    """sbatch's own words."""
    text = str(getattr(error, "stderr", "") or error)
    refused = [line for line in text.splitlines() if "error" in line.lower()]
    return " ".join((refused[-1] if refused else text).split())[:200]
