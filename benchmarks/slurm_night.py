"""A night on a cluster: a sweep on Slurm is preempted twice, its launcher killed once, and its command given again.

  python -m benchmarks.slurm_night [cluster=local] [preempt=PARTITION] [KEY=VALUE ...]

Without further arguments the sweep is sweep=merge_ablation experiment=openmoji_nano seeds=6; any lines of `python -m hdm.sweep` may
stand instead, such as a smaller budget. cluster=local brings up the two nodes of tests/slurm for it (root, Debian's packages).
preempt: the partition whose jobs take the nodes of the arms' away (prio, which the local cluster has).

The second preemption strikes while no launcher is there. Output of the launchers: launcher-1.log and launcher-2.log in the current
folder. Prints one line an event and the figures at the end. Exit status 1 when an arm is missing or ran twice, or when fewer than
two arms were disturbed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hdm.launch.arm import Arm
from hdm.launch.campaign import Sweep
from hdm.sweep import parse
from hdm.track.events import Event, read, settled

SLURM = Path(__file__).parents[1] / "tests" / "slurm"
DEFAULT = ["sweep=merge_ablation", "experiment=openmoji_nano", "seeds=6"]
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:7.0f} s  {text}", flush=True)


def option(arguments: list[str], name: str, default: str) -> str:
    found = [a for a in arguments if a.startswith(f"{name}=")]
    for a in found:
        arguments.remove(a)
    return found[-1].partition("=")[2] if found else default


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "hdm.sweep", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def saved(arm: Arm) -> bool:
    return any(arm.folder.glob("checkpoints/samples-*"))


def training(arms: list[Arm], launcher: subprocess.Popen[bytes]) -> list[Arm]:
    """Wait until some arms are at work and each of them has saved, and trained on; return them."""
    while True:
        busy = [arm for arm in arms if arm.folder.exists() and arm.outcome is None and statuses(arm)[-1:] == ["running"]]
        running = ask("squeue", "-h", "-r", "-t", "running", "-o", "%i").split()
        if busy and len(running) == len(busy) and all(map(saved, busy)):
            return busy
        if all(arm.outcome is not None for arm in arms):
            sys.exit("the sweep ended before it was disturbed; give it a larger budget, or a smaller train.checkpoint_every")
        if launcher.poll() not in (None, -signal.SIGKILL):
            sys.exit(f"the launcher ended with {launcher.returncode}; see its log")
        time.sleep(1)


def statuses(arm: Arm) -> list[str]:
    return [event.data["status"] for event in read(arm.folder) if event.type == "status"]


def preempt(partition: str) -> None:
    node = ask("squeue", "-h", "-t", "running", "-o", "%N").split()[0]
    say(f"preemption on {node}, where run: {' '.join(ask('squeue', '-h', '-r', '-t', 'running', '-w', node, '-o', '%i').split())}")
    ask("srun", f"--partition={partition}", f"--nodelist={node}", "--exclusive", "true")


def repeated(events: list[Event]) -> int:
    """Samples that were trained again, because they had not been saved."""
    lost = reached = 0
    for event in events:
        if event.type == "metrics" and event.data["samples"] is not None:
            reached = max(reached, event.data["samples"])
        elif event.type == "rewind":
            lost, reached = lost + max(0, reached - event.data["samples"]), event.data["samples"]
    return lost


def points(events: list[Event]) -> list[int]:
    """The sample counts at which the training loss was recorded, as often as it was; what a resumed run took back is not there."""
    return [e.data["samples"] for e in settled(events) if e.type == "metrics" and "train/loss" in e.data["values"]]


def figures(sweep: Sweep, arms: list[Arm]) -> bool:
    """Print what became of the arms; whether none is missing and none ran twice."""
    logs = {arm.label: read(arm.folder) for arm in arms}
    missing = [arm.label for arm in arms if arm.outcome is None or arm.outcome.status != "finished"]
    jobs = len(list(sweep.folder.glob("jobs/**/*_submitted.pkl")))
    losses = {label: points(events) for label, events in logs.items()}
    twice = [label for label, found in losses.items() if len(found) != len(set(found))]
    twice += [arm.label for arm in arms if statuses(arm).count("finished") > 1]
    disturbed = {arm.label: statuses(arm).count("running") - 1 for arm in arms}
    say(f"{len(arms)} arms, {jobs} jobs submitted, {len(missing)} missing {missing or ''}, {len(twice)} ran twice {twice or ''}")
    say(f"{sum(disturbed.values())} times an arm was begun again: { ({k: v for k, v in disturbed.items() if v}) }")
    samples = sum(max(found, default=0) for found in losses.values())
    say(f"{samples} samples trained, {sum(map(repeated, logs.values()))} of them again")
    return not missing and not twice and sum(disturbed.values()) >= 2


def night(arguments: list[str], partition: str) -> bool:
    sweep = parse(list(arguments))
    arms = list(sweep.arms)
    first = launch(arguments, Path("launcher-1.log"))
    say(f"sweep {sweep.name}: {len(arms)} arms")
    training(arms, first)
    preempt(partition)
    training(arms, first)
    first.kill()
    first.wait()
    say("the launcher is killed")
    preempt(partition)
    second = launch(arguments, Path("launcher-2.log"))
    code = second.wait()
    say(f"the same command ended with {code}")
    return figures(sweep, arms) and code == 0


def main() -> int:
    arguments = sys.argv[1:]
    local, partition = option(arguments, "cluster", "") == "local", option(arguments, "preempt", "prio")
    arguments = [*(arguments or DEFAULT), "launcher=slurm"]
    if not local:
        return 0 if night(arguments, partition) else 1
    os.environ |= {"SLURM_CI_DIR": "/dev/shm/hdm-slurm-night", "SLURM_CI_PORT": "16837"}
    os.environ["SLURM_CONF"] = f"{os.environ['SLURM_CI_DIR']}/slurm.conf"
    subprocess.run([SLURM / "up.sh"], check=True)
    try:
        return 0 if night(arguments, partition) else 1
    finally:
        subprocess.run([SLURM / "down.sh"], check=False)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        sys.exit(main())
