"""Training that starts from weights which are there: `init_from`, for fine-tuning and for a next run of a recipe.

The weights, by default their average, become the network's; averages start from them, and the optimizer starts afresh.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hdm.config.compose import flatten
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.lines import quote
from hdm.config.origin import find
from hdm.config.schema import RunConfig
from hdm.model import published
from hdm.model.backbone import Backbone
from hdm.train import single
from hdm.train.adapters import adapted
from hdm.train.checkpoint import load_model, load_weights

_ARCHITECTURE = ("backbone", "merge", "adaln", "norm", "attention", "mlp", "position", "encoding", "text_fusion", "model")
_SEEN = ("autoencoder", "autoencoder.channels", "autoencoder.factor", "text_encoder", "text_encoder.width")
_FREE = ("model.size", "model.gradient_checkpointing")  # a label, and how it is computed
_LISTED = 12


@dataclass(kw_only=True, slots=True)
class Weights:
    """Tensors under our names, and the run that they were trained in, where the file tells."""

    tensors: Mapping[str, Tensor]
    run: RunConfig | None


def warm_start(run: RunConfig, model: Backbone, *, fresh: bool) -> Backbone:
    """`model` as training of `run` begins: with the weights of `init_from`, then with adapters, where there are any.

    A run that is not `fresh` gets its weights from its own checkpoint instead. Raises ConfigError or CheckpointError, in one line,
    for weights that are not there, have changed since the run was named, or are of another network.
    """
    if run.init_from and fresh:
        fill(run, model)
    return adapted(run, model)


def fill(run: RunConfig, model: Backbone) -> None:
    """Copy what `init_from` names into `model`; without `init_strict` what fits, and say what does not."""
    source = f"init_from={run.init_from}"
    weights = _read(run, model, source=source)
    if run.init_strict:
        if weights.run is not None:
            _same_network(run, weights.run, source=source)
        load_weights(model, weights.tensors, source=Path(source))
        return
    own = model.state_dict()
    fitting = {name: t for name, t in weights.tensors.items() if name in own and own[name].shape == t.shape}
    if not fitting:
        raise CheckpointError(f"{source}: none of its {len(weights.tensors)} tensors fits the network; it is of another kind")
    model.load_state_dict({**own, **fitting})
    print(f"{source}: {len(fitting)} of the network's {len(own)} tensors are loaded")
    for words, names in (
        ("keep their initial values", [name for name in own if name not in fitting]),
        ("are left in the file", [name for name in weights.tensors if name not in fitting]),
    ):
        if names:
            rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            print(f"  {len(names)} {words}: {', '.join(names[:_LISTED])}{rest}")


def _read(run: RunConfig, model: Backbone, *, source: str) -> Weights:
    origin = find(run)
    if origin.digest != run.init_digest:
        raise ConfigError(
            f"{source}: its weights have changed since this run was named (digest {run.init_digest} then, {origin.digest} now);"
            " put them back, or give the command again for a new run"
        )
    try:
        if origin.path.is_dir():
            loaded = load_model(origin.path, weights=run.init_weights.name)
            return Weights(tensors=loaded.model.state_dict(), run=loaded.run)
        tensors, header = single.read(origin.path)
        if header.get("format") == single.FORMAT:
            return Weights(tensors=tensors, run=single.config(header, source=origin.path))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {str(error).removeprefix(f'ckpt={origin.path}: ')}") from None
    if published.prefix_of(tensors) is not None:
        return Weights(tensors=published.from_published(tensors, model, source=source, strict=run.init_strict), run=None)
    return Weights(tensors=tensors, run=None)


def _same_network(run: RunConfig, other: RunConfig, *, source: str) -> None:
    """Raise ConfigError where equal shapes would hide another function, such as another number of heads."""
    own, theirs = flatten(run), flatten(other)
    differing = [key for key in theirs if _matters(key) and own.get(key, theirs[key]) != theirs[key]]
    axes = {key for key in differing if "." not in key}
    differing = [key for key in differing if "." not in key or key.partition(".")[0] not in axes]  # fields of another variant
    if differing:
        there, here = (" ".join(f"{key}={_said(flat, key)}" for key in differing) for flat in (theirs, own))
        raise ConfigError(
            f"{source}: was trained with {there}, and this run has {here}; give the run {there}, or load what fits with"
            " init_strict=false"
        )


def _matters(key: str) -> bool:
    return key not in _FREE and (key in _SEEN or key.partition(".")[0] in _ARCHITECTURE)


def _said(flat: Mapping[str, Any], key: str) -> str:
    return quote(flat.get(key))
