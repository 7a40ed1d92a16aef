"""Snapshots of a run's averages, and averages of any width made of them (`hdm.train.posthoc`).

    snapshots/samples-000001024.safetensors     WIDTH/PARAMETER -> tensor, fp16; complete or not there

fp16, because its rounding is an eighth of bf16's; docs/training.md has the error that it makes. A checkpoint holds the same
averages in fp32, and is one more snapshot of its moment.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import WIDEST, EmaConfig
from hdm.files import replacing
from hdm.train.parallel import World, whole
from hdm.train.posthoc import Combination, Profile, combine

DTYPE = torch.float16
LARGEST_RESIDUAL = 0.1  # of the wanted profile; what misses more of it is not the average that was asked for
_FOLDER = "snapshots"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A stored average: what it is, the file that holds it, and what stands before a parameter's name there."""

    profile: Profile
    path: Path
    prefix: str = ""


# --- writing ----------------------------------------------------------------------------------------------------------


def write(folder: Path, *, samples: int, averages: Mapping[float, Mapping[str, Tensor]], world: World) -> None:
    """Store `averages` (relative width -> parameter -> tensor) as the snapshot of run `folder` at `samples`.

    All processes must ask, for tensors may be spread over them; the first one writes. Replaces the snapshot of the same moment.
    Raises CheckpointError when it cannot be written; what was there stays.
    """
    target = folder / _FOLDER / f"samples-{samples:09d}.safetensors"
    tensors = {}
    for width, group in averages.items():
        for name, tensor in group.items():
            gathered = whole(tensor)
            if world.main:
                tensors[f"{width!r}/{name}"] = gathered.detach().to("cpu", DTYPE).contiguous()
    if not world.main:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            save_file(tensors, partial)
            partial.chmod(0o644)  # safetensors makes it private
            _sync(partial)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = str(error).split("I/O error: ")[-1].split(" (os error")[0]
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise CheckpointError(
            f"{target}: cannot be saved: {reason}; it needs {size:,.0f} MB. Free some space and give the same command again, or"
            " start a run with a longer ema.snapshot_every"
        ) from None


def drop_after(folder: Path, samples: int) -> None:
    """Remove the snapshots of run `folder` that were taken after `samples`: a run that continues from there takes them again."""
    for path in _files(folder):
        if _moment(path) > samples:
            path.unlink()


def size(config: EmaConfig, *, parameters: int, samples: int) -> tuple[int, int]:
    """How many snapshots a run over `samples` takes of a network of `parameters`, and the bytes of one."""
    count = samples // config.snapshot_every if config.snapshot_every else 0
    return count, parameters * len(config.snapshot_powers) * DTYPE.itemsize


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------------


def width_of(weights: str) -> float | None:
    """The relative width that weights="ema:WIDTH" names; None for weights of another form. Raises ConfigError for no width."""
    name, colon, text = weights.partition(":")
    return parse_width(text, key=f"weights={weights}") if name == "ema" and colon else None


def parse_width(text: str, *, key: str) -> float:
    """The relative width `text`, which the option `key` gave. Raises ConfigError for none that a power-function average has."""
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 0 < width <= WIDEST:
        raise ConfigError(f"{key}: '{text}' is no width of a power-function average; name a number above 0, {WIDEST} or less")
    return width


def find(checkpoint: Path, config: EmaConfig, *, samples: int) -> list[Source]:
    """The stored averages of the run that `checkpoint`, at `samples`, belongs to: its snapshots so far, and the checkpoint's own.

    Raises CheckpointError for a run without any.
    """
    folder = checkpoint.parent.parent
    snapshots = [path for path in _files(folder) if _moment(path) < samples]
    sources = [
        Source(profile=Profile(width=width, samples=_moment(path)), path=path, prefix=f"{width!r}/")
        for path in snapshots
        for width in _widths(path)
    ]
    own = {width: checkpoint / f"ema-{name}.safetensors" for name, width in config.powers().items()}
    sources += [Source(profile=Profile(width=w, samples=samples), path=p) for w, p in own.items() if p.is_file()]
    if not snapshots:
        raise CheckpointError(
            f"{checkpoint}: its run has no snapshots, from which averages of other widths are made; train with"
            " ema.snapshot_every=…, a sixteenth of the run or less"
        )
    return sources


def moments(sources: Sequence[Source]) -> list[int]:
    """The numbers of samples seen at which averages were stored."""
    return sorted({source.profile.samples for source in sources})


def plan(sources: Sequence[Source], wanted: Profile) -> Combination:
    """How `wanted` comes out of the `sources` up to its moment; those after it get the coefficient 0."""
    before = [source.profile.samples <= wanted.samples for source in sources]
    found = combine([s.profile for s, early in zip(sources, before) if early], wanted)
    coefficients = np.zeros(len(sources))
    coefficients[before] = found.coefficients
    return Combination(coefficients=coefficients, residual=found.residual)


def check(combination: Combination, wanted: Profile) -> None:
    """Raise CheckpointError when the combination misses too much of what is wanted."""
    if combination.residual > LARGEST_RESIDUAL:
        raise CheckpointError(
            f"width {wanted.width:g}: what is stored up to {wanted.samples:,} samples misses {combination.residual:.0%} of this"
            f" average ({LARGEST_RESIDUAL:.0%} is the limit); ask for a width nearer to ema.snapshot_powers or a later moment, or"
            " train with a shorter ema.snapshot_every"
        )


def synthesize(
    sources: Sequence[Source], combinations: Sequence[Combination], *, advance: Callable[[float], None] = lambda _: None
) -> list[dict[str, Tensor]]:
    """The averages that `combinations` make of `sources`, summed in float64, as fp32 tensors by parameter; files are read once."""
    used = [any(c.coefficients[i] for c in combinations) for i in range(len(sources))]
    results: list[dict[str, Tensor]] = [{} for _ in combinations]
    with ExitStack() as stack:
        files = {s.path: stack.enter_context(_opened(s.path)) for s, needed in zip(sources, used) if needed}
        newest = max((s for s, needed in zip(sources, used) if needed), key=lambda source: source.profile.samples)
        keys = files[newest.path].keys()
        names = [key.removeprefix(newest.prefix) for key in keys if key.startswith(newest.prefix)]
        for name in names:
            sums: list[Tensor | None] = [None] * len(combinations)
            for i, source in enumerate(sources):
                if not used[i]:
                    continue
                tensor = _tensor(files[source.path], source, name).double()
                for k, combination in enumerate(combinations):
                    if combination.coefficients[i]:
                        term = tensor * float(combination.coefficients[i])
                        sums[k] = term if (total := sums[k]) is None else total.add_(term)
            for result, total in zip(results, sums):
                assert total is not None
                result[name] = total.float()
            advance(1)
    return results


def average(checkpoint: Path, config: EmaConfig, *, samples: int, width: float) -> dict[str, Tensor]:
    """The power-function average of relative `width` at `checkpoint`, which was saved at `samples`. Raises CheckpointError."""
    sources, wanted = find(checkpoint, config, samples=samples), Profile(width=width, samples=samples)
    combination = plan(sources, wanted)
    check(combination, wanted)
    return synthesize(sources, [combination])[0]


def _files(folder: Path) -> list[Path]:
    return sorted((folder / _FOLDER).glob("samples-*.safetensors"))


def _moment(path: Path) -> int:
    return int(path.stem.removeprefix("samples-"))


def _widths(path: Path) -> list[float]:
    """The relative widths of the averages in a snapshot."""
    with _opened(path) as file:
        return sorted({float(key.partition("/")[0]) for key in file.keys()})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {' '.join(str(error).split())}; remove it, the others will do") from None


def _tensor(file: Any, source: Source, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(f"{source.prefix}{name}")
        return tensor
    except SafetensorError:
        raise CheckpointError(
            f"{source.path}: has no tensor '{source.prefix}{name}'; remove the file, the others will do"
        ) from None
