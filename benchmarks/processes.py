"""Train one run with 1 and with 2 processes, DDP and FSDP2, straight and resumed by another number, and compare what they learned.

usage: python -m benchmarks.processes [steps=10] [KEY=VALUE ...]

The run is experiment=openmoji_nano in fp32, a batch of 8 in two micro-batches: one process takes 4 and 4, each of two 2 and 2. A
line gives the largest difference from the single process: of the training and the validation loss, relative; of weights, averages
and moments, relative to the largest value of their tensor, and in brackets the norm of the difference of all over the norm of all.
They differ by rounding alone, in the order of sums; Adam's first steps are whole ones however small the gradient, rounding
included, which the largest difference shows where weights begin at zero. `then` is a SIGTERM in the middle and the same command
with other processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.interruptions import command, heard, option, saved
from hdm.track.events import read, series

BATCH = 8
RUN = [
    f"train.batch_size={BATCH}", f"train.log_every={BATCH}", "train.accumulation=2", "train.precision=fp32",
    "validation.samples=32", "eval.initial=false",
]  # fmt: skip
STATES = {"weights": ("model",), "averages": ("ema-power", "ema-decay"), "moments": ("optimizer",)}
DDP, FSDP = "parallel.strategy=ddp", "parallel.strategy=fsdp"
ARMS = {  # who trains, and who goes on after an interruption
    "1 x 8, interrupted": ((1, DDP), (1, DDP)),
    "2 x 4, DDP": ((2, DDP),),
    "2 x 4, FSDP2": ((2, FSDP),),
    "2 x 4 DDP, then 1 x 8": ((2, DDP), (1, DDP)),
    "2 x 4 FSDP2, then 1 x 8": ((2, FSDP), (1, DDP)),
    "1 x 8, then 2 x 4 FSDP2": ((1, DDP), (2, FSDP)),
}


def train(out: Path, processes: int, overrides: list[str], *, interrupt_after: int | None = None) -> None:
    """Train to the end, or until `interrupt_after` samples are written down."""
    job = subprocess.Popen(
        command(overrides, out, processes), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while interrupt_after is not None and job.poll() is None:
        if heard(out) >= interrupt_after:
            job.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    _, errors = job.communicate()
    if job.returncode and interrupt_after is None:
        sys.exit(errors[-2000:])


def states(out: Path, stems: tuple[str, ...]) -> dict[str, Tensor]:
    newest = max(out.glob("*/checkpoints/samples-*"))
    return {f"{stem}/{name}": tensor for stem in stems for name, tensor in load_file(newest / f"{stem}.safetensors").items()}


def apart(one: Path, other: Path) -> list[str]:
    """Differences: training loss, validation loss, then each of STATES."""
    found = []
    for name in ("train/loss", "val/loss"):
        a, b = (dict(series(read(log.parent), name)) for out in (one, other) for log in out.glob("*/events.jsonl"))
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        found.append(f"{max(abs(a[key] - b[key]) / abs(a[key]) for key in a):.1e}")
    for stems in STATES.values():
        mine, theirs = states(one, stems), states(other, stems)
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        largest = max(((mine[k] - theirs[k]).abs().max() / mine[k].abs().max().clamp(min=1e-3)).item() for k in mine)
        share = (sum((mine[k] - theirs[k]).square().sum() for k in mine) / sum(mine[k].square().sum() for k in mine)) ** 0.5
        found.append(f"{largest:.1e} ({share:.1e})")
    return found


def main() -> None:
    arguments = sys.argv[1:]
    steps = option(arguments, "steps", 10)
    overrides = ["experiment=openmoji_nano", f"budget.steps={steps}", *RUN, *arguments]
    with TemporaryDirectory() as folder:
        single = Path(folder) / "single"
        train(single, 1, overrides)
        print(f"{steps} steps, compared with 1 process x {BATCH}\n")
        print("| processes | train/loss | val/loss | weights | averages | moments |\n|---|---|---|---|---|---|")
        for number, (name, parts) in enumerate(ARMS.items()):
            out = Path(folder) / str(number)
            for place, (processes, strategy) in enumerate(parts):
                last = place == len(parts) - 1
                train(out, processes, [*overrides, strategy], interrupt_after=None if last else BATCH * steps // 2)
                if not last and not 0 < saved(out) < BATCH * steps:
                    sys.exit(f"{name}: saved {saved(out)} samples; the run was not interrupted in its middle: raise steps=")
            assert len(list(out.glob("*/checkpoints"))) == 1, "went on in another folder"
            print(f"| {name} | " + " | ".join(apart(single, out)) + " |", flush=True)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        main()
