"""How far averages made of snapshots are from the same averages tracked at every step, by number of snapshots and their dtype.

usage: python benchmarks/ema_error.py [KEY=VALUE ...]

Trains experiment=lr_transfer (width 64, 400 steps of 16 images, seconds on a CPU) in a temporary folder and tracks every width in
float64 beside it. A row gives the relative error of all weights, ||made - tracked|| / ||tracked||, with snapshots kept in float64,
fp16 and bf16, what part of the profile is missing, and the distance to the nearest average that is stored.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hdm import cli
from hdm.config.compose import compose
from hdm.track.events import EventLog
from hdm.train.ema import Averages, power_exponent
from hdm.train.loop import train
from hdm.train.posthoc import Profile, combine

STORED, MADE, COUNTS = (0.05, 0.1), (0.03, 0.07, 0.14, 0.2, 0.25), (8, 16, 32, 64)
RUN = ["experiment=lr_transfer", "model.width=64", "optimizer.lr=1", "budget.steps=400", "train.checkpoint_every=1000000"]


@dataclass
class Tracker:
    """Power-function averages of all weights, as one float64 vector a width, and what they were every `every` samples."""

    every: int
    averages: dict[float, Tensor] = field(default_factory=dict)
    stored: dict[Profile, Tensor] = field(default_factory=dict)

    def update(self, weights: Tensor, *, samples: int, fresh: int) -> None:
        for width in (*STORED, *MADE):
            beta = (1 - fresh / samples) ** (power_exponent(width) + 1)
            self.averages[width] = self.averages.get(width, weights).lerp(weights, 1 - beta)
            if width in STORED and samples % self.every < fresh:
                self.stored[Profile(width=width, samples=samples)] = self.averages[width]


def table(tracker: Tracker, total: int) -> None:
    print("| snapshots | width | missing | float64 | fp16 | bf16 | nearest stored |\n|---|---|---|---|---|---|---|")
    moments = sorted({profile.samples for profile in tracker.stored})
    for count in COUNTS:
        chosen = moments[len(moments) // count - 1 :: len(moments) // count]
        kept = {profile: value for profile, value in tracker.stored.items() if profile.samples in chosen}
        for width in MADE:
            print(row(kept, tracker.averages[width], Profile(width=width, samples=total), count))


def row(kept: Mapping[Profile, Tensor], expected: Tensor, wanted: Profile, count: int) -> str:
    found = combine(list(kept), wanted)

    def error(value: Tensor) -> str:
        return f"{float((value - expected).norm() / expected.norm()):.1e}"

    made = [
        sum(float(c) * value.to(dtype).double() for c, value in zip(found.coefficients, kept.values()))
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    ]
    nearest = min(kept.values(), key=lambda value: float((value - expected).norm()))
    cells = (str(count), f"{wanted.width:g}", f"{found.residual:.2%}", *map(error, made), error(nearest))
    return f"| {' | '.join(cells)} |"


def command(arguments: list[str]) -> None:
    run = compose([*RUN, *arguments])
    assert run.budget.steps is not None
    total = run.budget.steps * run.train.batch_size
    tracker, original = Tracker(every=total // max(COUNTS)), Averages.update

    def update(self: Averages, *, samples: int, fresh: int) -> None:
        original(self, samples=samples, fresh=fresh)
        tracker.update(torch.cat([w.double().flatten() for w in self.weights]), samples=samples, fresh=fresh)

    Averages.update = update  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder), EventLog(Path(folder)))
    table(tracker, total)


if __name__ == "__main__":
    cli.main(command, __doc__)
