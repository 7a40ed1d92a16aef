"""Kill a run at random times, give its command again until it ends, and compare its weights with those of an undisturbed run.

  python -m benchmarks.interruptions [kills=2] [seed=0] [processes=1] [KEY=VALUE ...]

Without further arguments the run is experiment=xut_nano_full without final metrics. Prints one line a kill, and at the end whether
all files of the last checkpoint are equal to the bit. Exit status 1 when they are not.
"""

import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

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


def samples(out: Path) -> str:
    found = sorted(path.name for path in out.glob("*/checkpoints/samples-*"))
    return re.sub(r"samples-0*", "", found[-1]) or "0" if found else "none"


def main() -> int:
    arguments = sys.argv[1:]
    kills, seed, processes = option(arguments, "kills", 2), option(arguments, "seed", 0), option(arguments, "processes", 1)
    overrides = arguments or ["experiment=xut_nano_full"]
    draw = random.Random(seed)
    with TemporaryDirectory() as folder:
        straight, disturbed = Path(folder) / "straight", Path(folder) / "disturbed"
        began = time.monotonic()
        subprocess.run(command(overrides, straight, processes), check=True, stdout=subprocess.DEVNULL)
        lasted = time.monotonic() - began
        print(f"undisturbed: {lasted:.0f} s, {samples(straight)} samples", flush=True)
        for number in range(kills):
            patience = draw.uniform(0.2, 0.8) * lasted / (number + 1)
            job = subprocess.Popen(command(overrides, disturbed, processes), stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                job.wait(patience)
                print("the run ended before it was killed", flush=True)
            except subprocess.TimeoutExpired:
                subprocess.run(["pkill", f"-{signal.SIGKILL.value}", "-g", str(job.pid)], check=True)
                job.wait()
                print(f"killed after {patience:.0f} s; newest checkpoint at {samples(disturbed)} samples", flush=True)
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
