"""Adapters: low-rank updates of frozen linear layers, by peft. Only they are trained; merged, the network is an ordinary one.

Under optimizer.rule=mup_report an adapter's rate is lr / fan-in, as everywhere: lr / d_in for A (r x d_in), lr / r for B (d_out x r).
An Adam step then moves B A x by as much at any width and rank as a step of the whole matrix would move W x, up to a constant; B
learns d_in / r times faster than A, the order that LoRA+ derives (Hayou et al., 2024). The scale alpha / rank multiplies both.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hdm import rng
from hdm.config.errors import ConfigError
from hdm.config.schema import Adapter, RunConfig
from hdm.files import write_json
from hdm.model.backbone import Backbone
from hdm.model.block import Block

_NAME = "default"  # peft's name of the one adapter
_ZERO = ("lora_B", "lokr_w1", "lokr_w1_a")  # so that training begins at the frozen network


def adapted(run: RunConfig, model: Backbone) -> Backbone:
    """`model` with the adapters of `run.lora` in place of its target layers, which are frozen with all the rest; rank 0 changes nothing.

    Their initial values are a function of the seed and their names: uniform in +-1/sqrt(fan-in), or 0 where the update must start
    at 0. On the meta device they have none. Raises ConfigError for targets that name no linear layer.
    """
    if run.lora.rank == 0:
        return model
    _peft().inject_adapter_in_model(_config(run, targets(run, model)), model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            _initialize(name, parameter, run.seed)
    return model


def merged(model: Backbone) -> Backbone:
    """`model` with its adapters added to the weights beside them: an ordinary network again, with the names of one."""
    for name, module in _layers(model).items():
        module.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    return model.requires_grad_(True)


def save_adapter(model: Backbone, run: RunConfig, folder: Path) -> list[Path]:
    """Write the adapters alone, in peft's format: adapter_model.safetensors and adapter_config.json."""
    state: dict[str, Any] = _peft().get_peft_model_state_dict(model, adapter_name=_NAME)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}  # where peft's own wrapper has the network
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, weights, {"format": "pt"})
    write_json(config, _plain(_config(run, list(_layers(model))).to_dict()))
    return [weights, config]


def targets(run: RunConfig, model: Backbone) -> list[str]:
    """The linear layers that get an adapter: those of the blocks, or those whose names end as `lora.targets` say."""
    found = [
        f"{path}.{name}"
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for wanted in run.lora.targets:
        if not any(f".{name}".endswith(f".{wanted}") for name in found):
            endings = sorted({".".join(name.split(".")[-2:]) for name in found})
            raise ConfigError(f"lora.targets: no linear layer of the blocks ends in '{wanted}' (there are {', '.join(endings)})")
    return [name for name in found if not run.lora.targets or any(f".{name}".endswith(f".{t}") for t in run.lora.targets)]


def _config(run: RunConfig, names: list[str]) -> Any:
    peft, lora = _peft(), run.lora
    alpha = lora.rank if lora.alpha is None else lora.alpha
    if lora.kind is Adapter.lokr:
        return peft.LoKrConfig(r=lora.rank, alpha=alpha, decompose_factor=lora.factor, target_modules=names)
    return peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names)


def _peft() -> Any:
    from hdm import torchvision_cpu

    torchvision_cpu.declare()  # peft imports transformers, which probes for torchvision
    import peft

    return peft


@torch.no_grad()
def _initialize(name: str, parameter: nn.Parameter, seed: int) -> None:
    if any(part in _ZERO for part in name.split(".")):
        parameter.zero_()
        return
    bound = 1 / math.sqrt(math.prod(parameter.shape[1:]))
    draw = rng.generator(seed, "init", name).random(tuple(parameter.shape), dtype="float32")
    parameter.copy_(torch.from_numpy((draw * 2 - 1) * bound))


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def _plain(config: dict[str, Any]) -> Any:
    """peft's configuration as JSON; it holds sets."""
    return json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
