"""The forms of an export. Each writes a folder with its files and a model card, and returns the paths."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdm.config.axes import AUTOENCODER, AXES, TEXT_ENCODER
from hdm.config.compose import compose, flatten, from_flat
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import RunConfig
from hdm.diffusion.guidance import AutoguidanceConfig
from hdm.export.card import Card
from hdm.model import build, published
from hdm.model.backbone import Architecture
from hdm.train import single
from hdm.train.adapters import adapted, save_adapter
from hdm.train.checkpoint import Loaded, load_weights, name_at, read_tensors

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PIPELINE = '''"""The pipeline of this folder: text to image, by HDM-Lab.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("red apple", seed=0).images[0].save("apple.png")

All code is in the package hdm-lab, which trained the network; it is not on the package index. This file only imports it.
"""

try:
    from hdm.export.pipeline import HDMPipeline
except ImportError as error:
    raise ImportError(
        f"this pipeline needs HDM-Lab, the package that trained it ({error}); in a clone of its repository, pip install ."
    ) from error
'''


@dataclass(kw_only=True, slots=True)
class Target:
    """What is written, and where to: `everything` asks for encoders in the one file, `ckpt` is what the user named."""

    loaded: Loaded
    out: Path
    dtype: str
    licence: str | None
    everything: bool
    ckpt: str

    @property
    def run(self) -> RunConfig:
        """The run, without the adapters that are merged by now."""
        return from_flat({key: value for key, value in flatten(self.loaded.run).items() if not key.startswith("lora.")})

    def tensors(self) -> dict[str, Tensor]:
        """The network's tensors in the dtype that is asked for."""
        return self.cast(self.loaded.model.state_dict())

    def cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floating-point tensors in that dtype. Raises CheckpointError for values that it does not hold."""
        dtype = _DTYPES[self.dtype]
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        for name, tensor in cast.items():
            if tensor.is_floating_point() and not tensor.isfinite().all() and tensors[name].isfinite().all():
                raise CheckpointError(f"dtype={self.dtype}: '{name}' has values beyond its range; use dtype=bf16")
        return cast

    def card(self, usage: str) -> list[Path]:
        """Write the model card and, where the run has drawn samples, its newest grid."""
        return Card(loaded=self.loaded, run=self.run, dtype=self.dtype, licence=self.licence, usage=usage).write(self.out)


def one_file(target: Target) -> list[Path]:
    """model.safetensors with the configuration in its header."""
    path = target.out / "model.safetensors"
    header = single.metadata(target.run, samples=target.loaded.samples, weights=target.loaded.weights)
    single.write(path, target.tensors(), header)
    return [path, *target.card('    python -m hdm.sample ckpt=model.safetensors prompt="red apple"\n')]


def pipeline(target: Target) -> list[Path]:
    """A folder for `DiffusionPipeline.from_pretrained`."""
    run = target.run
    if isinstance(run.guidance, AutoguidanceConfig):
        raise ConfigError("guidance=autoguidance: needs a second network, and a pipeline holds one; export with guidance=cfg")
    from hdm.export.pipeline import FlowMatchEulerDiscreteScheduler, HDMPipeline, HDMTransformer

    transformer = HDMTransformer(run=_portable(run))
    load_weights(transformer.network, target.loaded.model.state_dict(), source=target.out)
    transformer.network.to(_DTYPES[target.dtype])
    text, pixels = _encoders(run)
    pipe = HDMPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        text_encoder=getattr(text, "network", None),
        tokenizer=getattr(text, "tokenizer", None),
        vae=getattr(pixels, "network", None),
    )
    try:
        pipe.save_pretrained(target.out)
        index = target.out / "model_index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps({**content, "_class_name": ["pipeline", "HDMPipeline"]}, indent=2) + "\n", encoding="utf-8")
        (target.out / "pipeline.py").write_text(_PIPELINE, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"out={target.out}: cannot be written: {error.strerror or error}") from None
    usage = (
        "    from diffusers import DiffusionPipeline\n"
        "    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)\n"
        '    pipe("red apple", seed=0).images[0].save("apple.png")\n\n'
        "HDM-Lab must be installed (`pip install .` in a clone of it): the folder's pipeline.py imports it.\n"
    )
    return [target.out, *target.card(usage)]


def comfyui(target: Target) -> list[Path]:
    """One file of the report author's layout: `unet.model.` and, if asked, `te.text_models.0.` and `vae.`."""
    run = target.run
    architecture = Architecture.of(run)
    published.require_upstream(architecture, subject="format=comfyui")
    if run.model.head_dim != 64:
        raise ConfigError(
            f"format=comfyui: the node has heads of 64 channels, and model.head_dim={run.model.head_dim}; train with 64"
        )
    if AXES["objective"].of(run.objective).name == "x_prediction":
        raise ConfigError("format=comfyui: the node expects a velocity, and objective=x_prediction; train with objective=velocity")
    if (channels := architecture.in_channels) != 4:
        raise ConfigError(
            f"format=comfyui: the node draws latents of 4 channels, and autoencoder.channels={channels}; train with autoencoder=kl"
        )
    tensors = published.to_published(target.tensors(), prefix="unet.model.")
    if target.everything:
        text, pixels = _encoders(run)
        for prefix, part in (("te.text_models.0.", text), ("vae.", pixels)):
            if not hasattr(part, "network"):
                raise ConfigError(f"parts=all: {type(part).__name__} has no weights; use parts=network")
            tensors |= {prefix + name: tensor.clone() for name, tensor in target.cast(part.network.state_dict()).items()}
    path = target.out / f"{target.loaded.folder.name}.safetensors"
    single.write(path, tensors, {"format": "pt"})
    if (run.model.dim, run.model.heads) != (1024, 16):
        print(f"note: the node was published for XUT-base, 1024 wide; whether it reads {run.model.dim} is not tested")
    return [
        path,
        *target.card("Put the .safetensors file into ComfyUI's checkpoints folder; the report author's HDM node loads it.\n"),
    ]


def adapter(target: Target) -> list[Path]:
    """The adapters alone, as peft has them."""
    run, folder = target.loaded.run, target.loaded.folder
    if run.lora.rank == 0:
        raise ConfigError(f"format=adapter: {target.ckpt} has no adapters; it is a run with lora.rank=0, use format=safetensors")
    checkpoint = folder / "checkpoints" / name_at(target.loaded.samples)
    model = adapted(run, build(Architecture.of(run), seed=None)).to_empty(device="cpu")
    source = checkpoint if checkpoint.is_dir() else Path(target.ckpt)
    load_weights(model, read_tensors(source, target.loaded.weights), source=source)
    paths = save_adapter(model, run, target.out)
    usage = (
        f"Adapters of peft, for the network of `init_from={run.init_from}` (digest {run.init_digest}):\n\n"
        "    peft.PeftModel.from_pretrained(network, FOLDER)\n"
    )
    return [*paths, *target.card(usage)]


def imported(path: Path, lines: list[str]) -> Loaded | None:
    """A file of the published layout as the network that `lines` describe; None for a file of another layout."""
    if not path.is_file():
        return None
    tensors, header = single.read(path)
    if header.get("format") == single.FORMAT or published.prefix_of(tensors) is None:
        return None
    run = compose(lines)
    model = build(Architecture.of(run), seed=None)
    found = published.from_published(tensors, model, source=f"ckpt={path}")
    model.to_empty(device="cpu").load_state_dict(found)
    return Loaded(run=run, model=model.eval(), samples=0, folder=path.parent / path.stem, checkpoint=path, weights="model")


def _encoders(run: RunConfig) -> tuple[Any, Any]:
    """Text encoder and autoencoder on the CPU."""
    cache = Path(run.cache)
    return TEXT_ENCODER.build(run.text_encoder, cache=cache), AUTOENCODER.build(run.autoencoder, cache=cache)


def _portable(run: RunConfig) -> dict[str, Any]:
    """The flat configuration without what belongs to this machine."""
    here = ("out", "datasets", "cache", "device", "track.", "hardware.", "init_from")
    return {key: value for key, value in flatten(run).items() if not key.startswith(here)}
