"""Train one run with 1 and with 2 processes, DDP and FSDP2, straight and resumed by another number, and compare what they learned.

usage: python -m benchmarks.processes [steps=10] [KEY=VALUE ...]

The run is experiment=openmoji_nano on real images and captions, a batch of 8 in two micro-batches: one process takes 4 and 4, each
of two takes 2 and 2. A line gives the largest difference from the single process: of the training and the validation loss, relative;
of weights, averages and moments, relative to the largest value of their tensor. They differ by rounding alone, in the order of sums.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from benchmarks.interruptions import command, option
from hdm.track.events import read

RUN = ["schedule=constant", "name=run", "train.batch_size=8", "train.accumulation=2", "train.log_every=8", "validation.samples=32"]
STATES = {"weights": ("model",), "averages": ("ema-power", "ema-decay"), "moments": ("optimizer",)}
DDP, FSDP = "parallel.strategy=ddp", "parallel.strategy=fsdp"
ARMS = {  # who takes the first half of the steps, and who the rest
    "1 x 8, again": ((1, DDP), (1, DDP)),
    "2 x 4, DDP": ((2, DDP), (2, DDP)),
    "2 x 4, FSDP2": ((2, FSDP), (2, FSDP)),
    "2 x 4 DDP, then 1 x 8": ((2, DDP), (1, DDP)),
    "2 x 4 FSDP2, then 1 x 8": ((2, FSDP), (1, DDP)),
    "1 x 8, then 2 x 4 FSDP2": ((1, DDP), (2, FSDP)),
}


def train(out: Path, processes: int, steps: int, *overrides: str) -> None:
    done = subprocess.run(
        command([*overrides, f"budget.steps={steps}"], out, processes),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])


def losses(out: Path) -> dict[tuple[str, int], float]:
    """The losses of every step, by name and samples seen; a repeated step counts as it was last."""
    found = {}
    for log in out.glob("*/events.jsonl"):
        for event in read(log.parent):
            if event.type == "metrics":
                for name in ("train/loss", "val/loss"):
                    if name in event.data["values"]:
                        found[name, event.data["samples"]] = event.data["values"][name]
    return found


def states(out: Path, stems: tuple[str, ...]) -> dict[str, object]:
    newest = max(out.glob("*/checkpoints/samples-*"))
    return {f"{stem}/{name}": tensor for stem in stems for name, tensor in load_file(newest / f"{stem}.safetensors").items()}


def apart(one: Path, other: Path) -> list[float]:
    """Largest relative differences: training loss, validation loss, then each of STATES."""
    a, b = losses(one), losses(other)  # a resumed run has one validation more, at its half
    found = [max(abs(a[key] - b[key]) / abs(a[key]) for key in a if key[0] == name) for name in ("train/loss", "val/loss")]
    for stems in STATES.values():
        mine, theirs = states(one, stems), states(other, stems)
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        found.append(max(((mine[k] - theirs[k]).abs().max() / mine[k].abs().max().clamp(min=1e-3)).item() for k in mine))
    return found


def main() -> None:
    arguments = sys.argv[1:]
    steps = option(arguments, "steps", 10)
    overrides = ["experiment=openmoji_nano", "eval.initial=false", *RUN, *arguments]
    with TemporaryDirectory() as folder:
        single = Path(folder) / "single"
        train(single, 1, steps, *overrides)
        print(f"largest difference from 1 process x 8 over {steps} steps, the second half resumed\n")
        print("| processes | train/loss | val/loss | weights | averages | moments |\n|---|---|---|---|---|---|")
        for number, (name, halves) in enumerate(ARMS.items()):
            out = Path(folder) / str(number)
            for until, (processes, strategy) in zip((steps // 2, steps), halves, strict=True):
                train(out, processes, until, *overrides, strategy)
            print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in apart(single, out)) + " |", flush=True)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        main()
