"""Which run a configuration is: its folder's name holds a digest of every key that influences the result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hdm.config.compose import flatten
from hdm.config.schema import RunConfig

# Where, how fast and how often it is looked at, but not what is computed.
NEUTRAL = (
    "experiment", "name", "out", "datasets", "cache", "device", "resume", "plugins", "matched", "track.", "hardware.", "eval.",
    "sampling.", "parallel.", "data.cache_gb", "data.max_quarantined", "train.workers", "train.log_every", "train.validate_every",
    "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints", "train.milestone_every",
)  # fmt: skip


# Said by a digest, and groups of keys that mean nothing while the key before them is off.
_BY_DIGEST = ("init_from",)
_IDLE = {"init_digest": "init_", "lora.rank": "lora."}


def identity(flat: Mapping[str, Any]) -> str:
    """Eight hex digits of what a flat configuration computes."""
    left_out = (*NEUTRAL, *_BY_DIGEST, *(group for switch, group in _IDLE.items() if not flat.get(switch)))
    essential = {key: value for key, value in flat.items() if not key.startswith(left_out)}
    return hashlib.blake2b(json.dumps(essential, sort_keys=True).encode(), digest_size=4).hexdigest()


def run_name(run: RunConfig) -> str:
    """The name of the run and of its folder, such as `openmoji_nano-s0-1f0c77ab`."""
    return f"{label(run)}-s{run.seed}-{identity(flatten(run))}"


def label(run: RunConfig) -> str:
    """What a person calls the run: its name, else that of its experiment."""
    return run.name or (run.experiment if run.experiment != "none" else "run")
