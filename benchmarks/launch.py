"""What a sweep costs besides its training: composing its arms, taking over what is finished, ranking, and one process for each arm.

usage: python -m benchmarks.launch [arms=1000] [seeds=10] [processes=3]

Seconds are those of the CPU, of this process and of those that it has started. The arms are synthetic: their folders hold what a
finished run leaves, with three validations, and nothing is trained. `processes` arms are then started one by one, as the launcher
of this machine does, and find that they are finished.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from hdm import cli
from hdm.files import write_json
from hdm.launch.arm import Arm, adopted
from hdm.launch.campaign import Sweep, execute
from hdm.launch.job import ArmJob
from hdm.launch.local import LocalLauncher
from hdm.sweep import parse
from hdm.track.events import EventLog


def used() -> float:
    """CPU seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pretend(arm: Arm, number: int) -> None:
    """Leave what a finished run leaves."""
    log = EventLog(arm.folder)
    loss = 0.3 + 1e-4 * (number % 97)
    for samples in (0, 14400, 28800):
        log.metrics({"val/loss": loss + 1 / (1 + samples), "train/loss": loss, "cost/seconds": 600.0, "cost/flops": 1e14}, samples)
    log.status("finished")
    log.close()
    write_json(arm.folder / "config.json", {})
    write_json(arm.folder / "result.json", {"status": "finished", "samples": 28800, "metrics": {"val/loss": loss}})


def start(sweep: Sweep, count: int) -> float:
    """Seconds of the CPU for one arm's process."""
    before = used()
    launcher = LocalLauncher(sweep.folder / "jobs", 1)
    for arm in sweep.arms[:count]:
        assert launcher.room() == 1  # and the last one's place is free
        overrides = adopted(arm, sweep.name)
        (job,) = launcher.submit(
            [ArmJob(overrides=overrides, folder=str(arm.folder), sweep=sweep.name, setting=arm.setting, environment={})]
        )
        while not job.done():
            time.sleep(0.1)
        if job.result()["status"] != "finished":
            raise SystemExit(f"{arm.label}: {job.result()['reason']}")
    return (used() - before) / count


def command(arguments: list[str]) -> None:
    """Measure and print."""
    arms, seeds, processes = (
        int(cli.take_option(arguments, key) or n) for key, n in (("arms", 1000), ("seeds", 10), ("processes", 3))
    )
    cli.reject_unknown(arguments, "options: arms=, seeds=, processes=")
    rates = ",".join(f"{0.1 + 0.001 * number:.3f}" for number in range(arms // seeds))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = used()
        sweep = parse([f"optimizer.lr={rates}", f"seeds={seeds}", "track.uri=off"])
        composed, memory = used() - began, megabytes()
        for number, arm in enumerate(sweep.arms):
            pretend(arm, number)
        before = used()
        with open(os.devnull, "w") as silence:
            shown, sys.stdout = sys.stdout, silence
            code = execute(sweep)
            sys.stdout = shown
        if code:
            raise SystemExit(f"exit code {code}")
        ran, count = used() - before, len(sweep.arms)
        print(f"{count} arms: composed and checked in {composed:.1f} s, {1000 * composed / count:.1f} ms an arm, {memory:.0f} MB")
        print(f"taken over, ranked and written in {ran:.1f} s, {1000 * ran / count:.1f} ms an arm, {megabytes():.0f} MB in all")
        size = (Path(sweep.folder) / "sweep.json").stat().st_size
        print(f"sweep.json has {size / 1e6:.2f} MB")
        print(f"an arm's process starts and ends in {start(sweep, processes):.1f} s")
        os.chdir("/")


if __name__ == "__main__":
    cli.main(command, __doc__)
