"""One process of a miniature run; torchrun starts several of them. Arguments: the run folder, then overrides.

With SLOW_DISK in the environment every file takes a third of a second to reach the disk.
"""

import json
import os
import sys
import time
from pathlib import Path

from squares import NANO, Listener

from hdm.config.compose import compose
from hdm.train import checkpoint
from hdm.train.loop import train
from hdm.train.parallel import processes

SERIES = (
    "train/loss", "train/grad_norm", "val/loss", "val/loss_whole", "cost/flops", "cost/seconds", "cost/gpu_hours",
    "speed/images_per_second", "train/stage",
)  # fmt: skip


def slow(path: Path) -> None:
    """Force `path` to a slow disk."""
    time.sleep(0.3)
    synced(path)


if __name__ == "__main__":
    synced = checkpoint._sync
    if "SLOW_DISK" in os.environ:
        checkpoint._sync = slow
    listener = Listener()
    folder = Path(sys.argv[1])
    result = train(compose([*NANO, *sys.argv[2:]]), folder, listener)
    losses = {key: listener.series(key) for key in SERIES}
    (folder / f"heard-{processes()[0]}.json").write_text(json.dumps([result.status, result.samples, losses]))
