"""Small trained-looking runs to export."""

import json

import pytest
import torch
from small_runs import NANO

from hdm.config.compose import compose, flatten
from hdm.model import Architecture, build
from hdm.train import checkpoint


@pytest.fixture
def written(tmp_path):
    """Makes the run folder of a network whose weights are moved so that they predict something."""

    def write(*words, name="run"):
        run = compose([*NANO, *words])
        draw = torch.Generator().manual_seed(0)
        weights = {k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in build(Architecture.of(run)).state_dict().items()}
        state = {"config": flatten(run), "samples": 64, "steps": 4, "skipped": 0, "data": {}}
        state |= {"seconds": 7200.0, "device_seconds": 14400.0, "flops": 3e9}
        checkpoint.save(tmp_path / name, samples=64, tensors={"model": weights, "ema-power": weights}, state=state, keep=1)
        (tmp_path / name / "config.json").write_text(json.dumps(flatten(run)))
        return tmp_path / name

    return write
