"""Kill a run at random moments, give its command again until it ends, and compare its weights with those of an undisturbed run.

  python -m benchmarks.interruptions [kills=2] [seed=0] [processes=1] [KEY=VALUE ...]

Without further arguments the run is experiment=xut_nano_full without final metrics. Prints one line a kill, and at the end whether
all files of the last checkpoint are equal to the bit. Exit status 1 when they are not, or when the run ended before it was killed.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from hdm.track.events import read

FILES = ("model.safetensors", "ema-power.safetensors", "ema-decay.safetensors", "optimizer.safetensors")


def option(arguments: list[str], name: str, default: int) -> int:
    found = [a for a in arguments if a.startswith(f"{name}=")]
    for a in found:
        arguments.remove(a)
    return int(found[-1].partition("=")[2]) if found else default


def command(overrides: list[str], out: Path, processes: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *several, "-m", "hdm.run", *overrides, f"out={out}", "track.uri=off", "eval.metrics=[]"]


def digests(out: Path) -> dict[str, str]:
    newest = max(out.glob("*/checkpoints/samples-*"))
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest()[:16] for name in FILES}


def saved(out: Path) -> int:
    """Samples seen by the newest checkpoint."""
    return max((int(path.name.partition("-")[2]) for path in out.glob("*/checkpoints/samples-*")), default=0)


def heard(out: Path) -> int:
    """Samples seen by the last numbers that the run has written down."""
    logs = [
        event.data["samples"] or 0 for log in out.glob("*/events.jsonl") for event in read(log.parent) if event.type == "metrics"
    ]
    return max(logs, default=0)


def kill(job: subprocess.Popen[bytes], out: Path, *, beyond: int, after: float) -> bool:
    """SIGKILL the whole job `after` seconds behind its first word of `beyond` samples; False when it ended before."""
    while job.poll() is None and heard(out) < beyond:
        time.sleep(0.2)
    try:
        job.wait(after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        return True


def main() -> int:
    arguments = sys.argv[1:]
    kills, seed, processes = option(arguments, "kills", 2), option(arguments, "seed", 0), option(arguments, "processes", 1)
    overrides = arguments or ["experiment=xut_nano_full"]
    draw = random.Random(seed)
    with TemporaryDirectory() as folder:
        straight, disturbed = Path(folder) / "straight", Path(folder) / "disturbed"
        began = time.monotonic()
        subprocess.run(command(overrides, straight, processes), check=True, stdout=subprocess.DEVNULL)
        total = saved(straight)
        print(f"undisturbed: {time.monotonic() - began:.0f} s, {total} samples", flush=True)
        for beyond in sorted(draw.randrange(1, int(0.9 * total)) for _ in range(kills)):
            job = subprocess.Popen(command(overrides, disturbed, processes), stdout=subprocess.DEVNULL, start_new_session=True)
            if not kill(job, disturbed, beyond=beyond, after=draw.uniform(0, 3)):
                print("the run ended before it was killed: nothing is shown")
                return 1
            print(
                f"killed behind sample {beyond}; it had written down {heard(disturbed)}, and saved {saved(disturbed)}", flush=True
            )
        subprocess.run(command(overrides, disturbed, processes), check=True, stdout=subprocess.DEVNULL)
        one, other = digests(straight), digests(disturbed)
        for name in FILES:
            print(f"{name:<24} {one[name]}  {other[name]}  {'equal' if one[name] == other[name] else 'DIFFERENT'}")
        return 0 if one == other else 1


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        sys.exit(main())
