"""torch.compile per block: what eager training learns, in one piece of code for all blocks that are alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hdm.train.checkpoint import latest

pytestmark = pytest.mark.slow

WORDS = [
    "budget.steps=6", "train.log_every=4", "schedule=constant", "model.depth=3", "routing.rate=0.5",
    "captions.tag_dropout=0.5", "captions.text_dropout=0.2",  # captions of many lengths
]  # fmt: skip

PROGRAM = """
import sys, torch
sys.argv = ["spread_run", *sys.argv[1:]]
import runpy
runpy.run_module("spread_run", run_name="__main__")
counters = torch._dynamo.utils.counters
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
"""


def trained(folder, *overrides):
    """What the run heard, its weights, and (graphs, breaks) of the compiler."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    command = [sys.executable, "-c", PROGRAM, str(folder), *WORDS, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recompile_limit" not in done.stderr
    heard = json.loads((folder / "heard-0.json").read_text())
    weights = load_file(latest(folder) / "model.safetensors")
    return heard[2], weights, [int(number) for number in done.stdout.splitlines()[-1].split()]


def test_compiled_training_is_eager_training(shards, tmp_path):
    eager, weights, (none, _) = trained(tmp_path / "eager")
    compiled, other, (graphs, breaks) = trained(tmp_path / "compiled", "parallel.compile=true")
    _, _, (of_more, more_breaks) = trained(tmp_path / "more", "parallel.compile=true", "model.depth=5", "budget.steps=9")
    assert none == 0
    assert breaks == more_breaks == 0
    # Blocks are plain, with a merge, with a merge of their own input, or the last; with and without gradients; for one length and
    # any; with and without padding. More blocks and more lengths of text are no more code.
    assert 0 < graphs == of_more <= 4 * 2 * 2 * 2
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert compiled[key] == pytest.approx(eager[key], rel=2e-4), key
    for name, tensor in weights.items():
        assert (tensor - other[name]).abs().max() <= 2e-3 * tensor.abs().max().clamp(min=1e-3), name
