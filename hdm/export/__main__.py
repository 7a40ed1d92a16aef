"""A trained network in the form that another program reads.

usage: python -m hdm.export ckpt=RUN_OR_CHECKPOINT format=safetensors|diffusers|comfyui|adapter [OPTION ...] [KEY=VALUE ...]

  python -m hdm.export ckpt=runs/NAME format=safetensors                 one file, its configuration in the header
  python -m hdm.export ckpt=runs/NAME format=diffusers guidance.scale=2  a folder for DiffusionPipeline.from_pretrained
  python -m hdm.export ckpt=runs/NAME format=comfyui dtype=fp16          the one file of the report author's ComfyUI node
  python -m hdm.export ckpt=runs/TUNED format=adapter                    the adapters of a lora.rank run alone, as peft has them
  python -m hdm.export ckpt=hdm.safetensors format=safetensors preset=xut_upstream   weights of the published layout, imported

weights=ema       ema | raw | ema_decay | ema:WIDTH, such as ema:0.07 (python -m hdm.ema)
dtype=fp32        fp32 | bf16 | fp16: how numbers are stored
out=FOLDER        below export/ in the run folder by default; a folder that holds anything else is left alone
license=TEXT      what you license the weights under, for the model card
parts=network     of comfyui: all also writes the text encoder and the autoencoder into the file
compare=PROMPT    of diffusers: load the folder, draw this prompt with it and with our own sampler, and write both, side by side,
                  as compare.png with their largest difference; repeatable
Also, and stored as defaults: sampler.*, guidance.* (python -m hdm.variants sampler). Adapters are merged except by format=adapter.
Every form comes with a model card, README.md: configuration, data, licences, metrics with their protocols, cost. docs/export.md.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hdm import cli
from hdm.config.amend import amend, check_amendable
from hdm.config.errors import CheckpointError, HdmError, suggest

if TYPE_CHECKING:
    from hdm.train.checkpoint import Loaded

_OPTIONS = ("ckpt", "format", "weights", "dtype", "out", "license", "parts")
_REPEATED = "compare"


class Format(StrEnum):
    """What to write."""

    safetensors = "safetensors"
    diffusers = "diffusers"
    comfyui = "comfyui"
    adapter = "adapter"


class Stored(StrEnum):
    """How numbers are stored."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Parts(StrEnum):
    """What a one-file checkpoint holds."""

    network = "network"
    all = "all"


E = TypeVar("E", bound=StrEnum)


@dataclass(kw_only=True, slots=True)
class Request:
    """What is asked for."""

    ckpt: str
    format: Format
    weights: str
    dtype: Stored
    out: str | None
    licence: str | None
    parts: Parts
    compare: list[str]
    overrides: list[str]

    @property
    def imports(self) -> bool:
        """Whether `ckpt` may be a file of the published layout, whose configuration the command line gives."""
        return self.ckpt.endswith(".safetensors")


def parse(arguments: list[str]) -> Request:
    """Read the command line. Raises HdmError for what cannot be meant."""
    compare = [a.partition("=")[2] for a in arguments if a.startswith(f"{_REPEATED}=")]
    rest = [a for a in arguments if not a.startswith(f"{_REPEATED}=")]
    values = {name: cli.take_option(rest, name) for name in _OPTIONS}
    for text in rest:
        key = text.partition("=")[0]
        if "." not in key and (close := suggest(key, [*_OPTIONS, _REPEATED])):
            raise HdmError(f"{text}: no such option{close}")
    if not values["ckpt"]:
        raise HdmError("ckpt= is missing; name a run folder or a checkpoint: python -m hdm.export ckpt=runs/NAME format=diffusers")
    if not values["format"]:
        raise HdmError(f"format= is missing; choose one of {', '.join(Format)}")
    request = Request(
        ckpt=values["ckpt"],
        format=_choice(Format, "format", values["format"]),
        weights=values["weights"] or "ema",
        dtype=_choice(Stored, "dtype", values["dtype"] or "fp32"),
        out=values["out"],
        licence=values["license"],
        parts=_choice(Parts, "parts", values["parts"] or "network"),
        compare=compare,
        overrides=rest,
    )
    if request.parts is Parts.all and request.format is not Format.comfyui:
        raise HdmError(f"parts=all: only format=comfyui takes it; format={request.format} writes what belongs to it")
    if compare and request.format is not Format.diffusers:
        raise HdmError(f"compare={compare[0]}: only format=diffusers has a pipeline to compare with; leave it out")
    if not request.imports:
        check_amendable(rest)
    return request


def command(arguments: list[str]) -> None:
    """Load, write, and say where."""
    request = parse(arguments)
    from hdm.export import write

    loaded = _loaded(request)
    out = Path(request.out) if request.out else loaded.folder / "export" / f"{request.format}-{request.dtype}"
    _check_place(out)
    writer = {
        Format.safetensors: write.one_file,
        Format.diffusers: write.pipeline,
        Format.comfyui: write.comfyui,
        Format.adapter: write.adapter,
    }[request.format]
    target = write.Target(
        loaded=loaded,
        out=out,
        dtype=request.dtype,
        licence=request.licence,
        everything=request.parts is Parts.all,
        ckpt=request.ckpt,
    )
    for path in writer(target):
        print(path)
    if request.compare:
        from hdm.export.compare import compare

        path, difference = compare(loaded, out, request.compare)
        print(f"{path}\nlargest difference of a pixel, in [0, 1], between our sampler and the pipeline: {difference:.1e}")


def _loaded(request: Request) -> "Loaded":
    """The network, and its run as it is to be sampled."""
    from hdm.export.write import imported
    from hdm.train.checkpoint import load_model

    if request.imports and (found := imported(Path(request.ckpt), request.overrides)) is not None:
        return found
    check_amendable(request.overrides)
    loaded = load_model(request.ckpt, weights=request.weights)
    loaded.run = amend(loaded.run, request.overrides)
    return loaded


def _check_place(out: Path) -> None:
    """A folder is filled when it is empty, or holds an export."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "README.md").is_file())):
        raise CheckpointError(f"out={out}: exists and is no export; name another folder")


def _choice(kind: type[E], key: str, value: str) -> E:
    if value not in set(kind):
        raise HdmError(f"{key}={value}: no such {key}{suggest(value, kind)} (options: {', '.join(kind)})")
    return kind(value)


if __name__ == "__main__":
    cli.main(command, __doc__)
