"""Memory that runs out: the override that is named is the one that leaves least to keep, by the estimate of the plan."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from squares import NANO

from hdm.config.compose import compose
from hdm.config.errors import TrainingError
from hdm.model import Architecture
from hdm.model.memory import saved_bytes
from hdm.train.checkpoint import latest
from hdm.train.oom import explained

BIG = [*NANO, "train.batch_size=64", "train.accumulation=2"]


def words(run, error, processes=1):
    with pytest.raises(TrainingError) as caught, explained(run, processes):
        raise error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(run, accumulation):
    rate, text = run.routing.rate, run.text_encoder.max_length
    return saved_bytes(Architecture.of(run), batch=64 // accumulation, grid=(4, 4), text_tokens=text, rate=rate)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_the_change_that_helps_most_is_named(error):
    run = compose(BIG)
    cheaper = dataclasses.replace(run, model=dataclasses.replace(run.model, gradient_checkpointing=True))
    best = min(
        [("model.gradient_checkpointing=true", kept(cheaper, 2)), ("train.accumulation=4", kept(run, 4))], key=lambda c: c[1]
    )
    said = words(run, error)
    assert f"set {best[0]}: activations of {kept(run, 2) / 1e9:.3g} GB become {best[1] / 1e9:.3g} GB" in said


def test_with_checkpointing_on_it_is_the_next_accumulation_that_the_processes_divide():
    run = compose([*BIG, "model.gradient_checkpointing=true", "train.batch_size=24", "train.accumulation=3"])
    assert "set train.accumulation=6:" in words(run, MemoryError(), processes=2)
    assert "set train.accumulation=8:" in words(run, MemoryError(), processes=3)  # 24 / 6 = 4 images are no three parts


def test_where_nothing_is_left_to_change():
    run = compose([*NANO, "model.gradient_checkpointing=true", "train.batch_size=4", "train.accumulation=4"])
    assert "choose a smaller model= or crop.size" in words(run, MemoryError())


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained(compose(NANO), 1):
        raise RuntimeError("shapes do not fit")


def test_memory_that_really_runs_out(shards):
    """A process that may have 700 MB more, and a step that keeps gigabytes: one line, and the checkpoint from before."""
    words = [
        "model.dim=128", "model.mlp_dim=512", "model.head_dim=64", "train.batch_size=1024", "sampling.grid=0", "budget.steps=1",
    ]  # fmt: skip
    program = (
        "import re, resource\nfrom pathlib import Path\nfrom squares import NANO, Listener\n"
        "from hdm.config.compose import compose\nfrom hdm.config.errors import TrainingError\nfrom hdm.train.loop import train\n"
        f"run = compose([*NANO, *{words!r}])\n"
        "used = int(re.search(r'VmSize:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000, resource.RLIM_INFINITY))\n"
        "try:\n    train(run, Path('run'), Listener())\nexcept TrainingError as error:\n    print('said:', error)\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    said = done.stdout.splitlines()[-1]
    assert re.match(
        r"said: memory ran out \(.*\); set (model\.gradient_checkpointing=true|train\.accumulation=2): activations of [\d.]+ GB"
        r" become [\d.]+ GB\. The same command continues$",
        said,
    ), done.stderr[-2000:]
    assert latest(Path("run")).name == "samples-000000000"
