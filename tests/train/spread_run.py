"""One process of a miniature run; torchrun starts several of them. Arguments: the run folder, then overrides."""

import json
import sys
from pathlib import Path

from squares import NANO, Listener

from hdm.config.compose import compose
from hdm.train.loop import train
from hdm.train.parallel import processes

if __name__ == "__main__":
    listener = Listener()
    folder = Path(sys.argv[1])
    result = train(compose([*NANO, *sys.argv[2:]]), folder, listener)
    losses = {key: listener.series(key) for key in ("train/loss", "train/grad_norm", "val/loss", "cost/flops")}
    (folder / f"heard-{processes()[0]}.json").write_text(json.dumps([result.status, result.samples, losses]))
