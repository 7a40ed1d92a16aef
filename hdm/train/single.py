"""A trained network as one safetensors file, its configuration in the header: what `python -m hdm.export` writes.

The header's metadata holds `format`, `config` (flat, as in config.json), `samples` seen and `weights`, the checkpoint's file that
they were. Every command that takes `ckpt=` takes such a file too.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdm.config.compose import flatten, from_flat
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import RunConfig
from hdm.files import replacing
from hdm.model import build
from hdm.model.backbone import Architecture
from hdm.train.checkpoint import Loaded, load_weights

FORMAT = "hdm-lab/1"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file at `path`, at once or not at all. Raises CheckpointError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
            partial.chmod(0o644)  # safetensors makes it private
    except (OSError, SafetensorError) as error:
        reason = str(error).split("I/O error: ")[-1].split(" (os error")[0]
        raise CheckpointError(f"{path}: cannot be written: {reason}; make room, or name another place with out=") from None


def metadata(run: RunConfig, *, samples: int, weights: str) -> dict[str, str]:
    """The header of the network of `run`."""
    return {"format": FORMAT, "config": json.dumps(flatten(run)), "samples": str(samples), "weights": weights}


def read(path: Path, *, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises CheckpointError for one that is not readable."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is not readable as safetensors: {' '.join(str(error).split())}") from None


def config(header: Mapping[str, str], *, source: Path) -> RunConfig:
    """The run that a header tells of. Raises CheckpointError for a file that this laboratory has not written."""
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{source}: has no configuration in its header; only files of python -m hdm.export format=safetensors have one."
            " Weights alone can be trained on (init_from=), or brought into this form: python -m hdm.export --help"
        )
    try:
        return from_flat(json.loads(header["config"]))
    except (ConfigError, KeyError, ValueError) as error:
        raise CheckpointError(f"{source}: its configuration is not one of this version: {error}") from None


def load(path: Path, *, device: torch.device | str = "cpu") -> Loaded:
    """The network of an exported file, in eval mode and float32, as `hdm.train.checkpoint.load_model` returns it."""
    tensors, header = read(path, device=device)
    run = config(header, source=path)
    model = build(Architecture.of(run), seed=None).to_empty(device=device)
    load_weights(model, tensors, source=path)
    samples, weights = int(header.get("samples", 0)), header.get("weights", "model")
    return Loaded(run=run, model=model.eval(), samples=samples, folder=path.parent, weights=weights)
