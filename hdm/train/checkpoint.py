"""Checkpoints: folders of safetensors that are complete or not there.

    checkpoints/samples-000001024/{model,ema-power,ema-decay,optimizer}.safetensors + state.json

Everything is written into a hidden sibling folder and forced to the disk; state.json comes last and holds the size and digest of
every file; then the folder is renamed into place. Whatever kills the process, no earlier checkpoint is touched.

torch.distributed.checkpoint copies and writes them beside the training, and reads them into any number of processes (storage.py).
"""

import concurrent.futures
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from hdm.config.compose import from_flat
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import RunConfig
from hdm.files import sha256
from hdm.model.backbone import Architecture, Backbone
from hdm.train import snapshots, storage
from hdm.train.parallel import World
from hdm.train.storage import Shape

FORMAT = 1
OTHER_VERSION = "it was written by another version; start a new run with another name="
_WEIGHTS = {"ema": ("ema-power", "ema-decay", "model"), "raw": ("model",), "ema_decay": ("ema-decay",)}

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(kw_only=True, slots=True)
class Loaded:
    """A trained network. `folder` is its run's, `weights` what was read of `checkpoint`: model, ema-power, ema-decay, ema-0.07."""

    run: RunConfig
    model: Backbone
    samples: int
    folder: Path
    checkpoint: Path
    weights: str


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes the checkpoints of a run beside the training, which waits for a copy of the tensors, not for the disk.

    Used as a context, which ends when the last one is written. An error shows at the next checkpoint, or at the end.
    """

    def __init__(self, newest: Path | None, world: World | None = None) -> None:
        """`newest` is the checkpoint that the run goes on from. The processes of `world` together write what is spread."""
        self.newest, self.world = newest, world or World()
        self._pending: tuple[Future[Any], Path, int] | None = None
        gpu = torch.cuda.is_available()
        options = StagingOptions(use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu)
        self._copies = DefaultStager(options)  # in memory of the host that is kept from one checkpoint to the next

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._pending is not None and kind is not KeyboardInterrupt:
            concurrent.futures.wait([self._pending[0]])
        self._copies.close()

    def submit(
        self, folder: Path, *, samples: int, tensors: Tensors, state: Mapping[str, Any], keep: int, milestone: bool = False
    ) -> None:
        """`save`, soon: the tensors may change when this returns; all processes must ask.

        Raises CheckpointError when the checkpoint before could not be saved.
        """
        self.wait()
        state_dict, everything = _state_dict(tensors)
        together = any(isinstance(tensor, DTensor) for tensor in everything)
        if not (self.world.main or together):
            return
        target = folder / "checkpoints" / name_at(samples)

        def seal() -> None:
            _seal(target, {**state, "milestone": milestone})
            _prune(target, keep)

        _quiet()
        saved = async_save(
            state_dict,
            storage_writer=storage.Writer(_partial(target), tensors, seal),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # what all have, the first one writes
            process_group=self.world.saving,
            async_stager=self._copies,
            no_dist=not together,
        )
        assert isinstance(saved, Future)
        self._pending = saved, target, sum(tensor.nbytes for tensor in everything)

    def wait(self) -> None:
        """Return when everything is on the disk. Raises CheckpointError when it could not be saved."""
        if self._pending is None:
            return
        saved, target, size = self._pending
        self._pending = None
        try:
            saved.result()
        except CheckpointException as failure:
            error = next(iter(failure.failures.values()))[0]
            if not isinstance(error, OSError):
                raise error from None
            if self.world.main:
                shutil.rmtree(_partial(target), ignore_errors=True)
            raise CheckpointError(_unsaved(target, size, error)) from None
        self.newest = target


def save(folder: Path, **options: Any) -> Path:
    """Write `tensors` (file stem -> name -> tensor) and `state` as the checkpoint of run `folder` at `samples`; drop old ones.

    Options are those of `Writer.submit`. Keeps the `keep` newest, the one of the initial weights, and those that were saved as a
    `milestone`. Raises CheckpointError when the disk is full or not writable; the checkpoints that are there stay as they are.
    """
    with Writer(None) as writer:
        writer.submit(folder, **options)
    assert writer.newest is not None
    return writer.newest


def _state_dict(tensors: Tensors) -> tuple[dict[str, Any], list[Tensor]]:
    """`tensors` as torch.distributed.checkpoint takes them, without gradients and without files that have none; and all of them."""
    found = {file: {name: tensor.detach() for name, tensor in group.items()} for file, group in tensors.items() if group}
    return found, [tensor for group in found.values() for tensor in group.values()]


def _quiet() -> None:
    """torch.distributed.checkpoint says that a single process is one, every time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def name_at(samples: int) -> str:
    """The name of the checkpoint at `samples` seen."""
    return f"samples-{samples:09d}"


def _partial(target: Path) -> Path:
    """The folder that becomes checkpoint `target`."""
    return target.with_name(f".{target.name}.partial")


def _seal(target: Path, state: Mapping[str, Any]) -> None:
    """Complete the files of a checkpoint with state.json, and put them in their place for good."""
    partial, files = _partial(target), {}
    for path in sorted(partial.glob("*.safetensors")):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    path = partial / "state.json"
    path.write_text(json.dumps({"format": FORMAT, **state, "files": files}, indent=1), encoding="utf-8")
    _sync(path)
    _sync(partial)
    if target.exists():  # a damaged one that was passed over
        shutil.rmtree(target)
    partial.rename(target)
    _sync(target.parent)


def _prune(newest: Path, keep: int) -> None:
    """Leave the first, milestones and the `keep` up to `newest`. Later ones are damaged: runs go on from the newest good one."""
    found = _folders(newest.parent)
    earlier = [path for path in found if _samples(path) <= _samples(newest)]
    wanted = {path for path in earlier if _samples(path) == 0 or _is_milestone(path)} | set(earlier[-keep:])
    for path in found:
        if path not in wanted:
            shutil.rmtree(path, ignore_errors=True)


def _is_milestone(path: Path) -> bool:
    try:
        return bool(read_state(path).get("milestone"))
    except CheckpointError:
        return False


def _unsaved(target: Path, size: int, error: OSError) -> str:
    earlier = [p.name for p in _folders(target.parent) if _samples(p) < _samples(target)]
    elsewhere = isinstance(error, FileNotFoundError)  # on a host of another process
    remedy = "Put the run folder where every process sees it" if elsewhere else "Free some space"
    return (
        f"{target}: cannot be saved: {error.strerror or error}; it needs {size / 1e6:,.0f} MB. {remedy} and give the same command"
        f" again; it continues from {earlier[-1] if earlier else 'the beginning'}"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------------


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of run `folder`; damaged ones are passed over with a warning. None when there is none."""
    for path in reversed(_folders(folder / "checkpoints")):
        if (reason := damage(path)) is None:
            return path
        print(f"warning: {path} is damaged ({reason}); trying the one before", file=sys.stderr)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with checkpoint `path`, or None when every file has the size and digest that state.json records."""
    try:
        files = read_state(path)["files"]
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    for name, wanted in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != wanted["bytes"]:
            return f"{name} has {size:,} bytes instead of {wanted['bytes']:,}"
        if sha256(file) != wanted["sha256"]:
            return f"{name} has other contents than when it was written"
    return None


def read_state(path: Path, *keys: str) -> dict[str, Any]:
    """What state.json of checkpoint `path` says. Raises CheckpointError when it is missing, damaged, or says nothing of `keys`."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: state.json is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: state.json is not readable: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: state.json is not of format {FORMAT}; this version of the laboratory cannot read it")
    if missing := [key for key in ("files", *keys) if key not in state]:
        raise CheckpointError(f"{path}: state.json does not say '{missing[0]}'; use another checkpoint")
    return state


def read_tensors(path: Path, stem: str, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one file of checkpoint `path`."""
    file = path / f"{stem}.safetensors"
    try:
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_unreadable(file, error)) from None


def read_layout(path: Path, stem: str) -> dict[str, storage.Stored]:
    """Types and shapes of the tensors of one file of checkpoint `path`."""
    file = path / f"{stem}.safetensors"
    try:
        return storage.layout(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_unreadable(file, error)) from None


def read_into(path: Path, tensors: Tensors, *, world: World) -> None:
    """Fill `tensors` (file stem -> name -> tensor, of which each process may hold a part) from checkpoint `path`.

    All processes must ask, however many wrote it. Raises CheckpointError for a file that lacks one or cannot be read.
    """
    for stem, group in tensors.items():
        stored = read_layout(path, stem)
        for name, tensor in group.items():
            if name not in stored or stored[name].shape != tuple(tensor.shape):
                wanted = f"'{name}' of shape {tuple(tensor.shape)}"
                raise CheckpointError(f"{path / stem}.safetensors: has no tensor {wanted}; {OTHER_VERSION}")
    _quiet()
    state_dict, _ = _state_dict(tensors)
    try:
        load(state_dict, storage_reader=storage.Reader(path, tensors), process_group=world.control, no_dist=world.size == 1)
    except CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
        raise CheckpointError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: BaseException) -> str:
    return f"{path}: not readable: {' '.join(str(error).split())}; use another checkpoint"


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy `tensors` into `model`. Raises CheckpointError naming the first tensor that is missing, unknown or of another shape."""
    check_weights(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source=source)
    model.load_state_dict(tensors)


def check_weights(model: nn.Module, shapes: Mapping[str, Shape], *, source: Path) -> None:
    """Raise CheckpointError for the first tensor of `shapes` that `model` lacks or has in another one, or that is missing there."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    remedy = "the file is of another architecture; load it with the configuration that wrote it (config.json of its run)"
    for name in [*own, *shapes]:
        if name not in shapes:
            raise CheckpointError(f"{source}: has no tensor '{name}', which the network has; {remedy}")
        if name not in own:
            raise CheckpointError(f"{source}: holds tensor '{name}', which the network does not have; {remedy}")
        if own[name] != shapes[name]:
            raise CheckpointError(f"{source}: '{name}' has shape {shapes[name]} there and {own[name]} in the network; {remedy}")


def load_model(path: str | Path, *, weights: str = "ema", device: torch.device | str = "cpu") -> Loaded:
    """The network of a run folder (its newest complete checkpoint), of one checkpoint folder or of an exported file, in eval mode.

    `weights`: "ema" (the power-function average, else the plain one, else raw), "raw", "ema_decay", or "ema:0.07", the average of
    that relative width made of the run's snapshots. Raises CheckpointError, in one line, for a path that is no checkpoint, a
    damaged one, or one that does not fit its configuration.
    """
    from hdm.model import build
    from hdm.train import single
    from hdm.train.adapters import adapted, merged

    width = snapshots.width_of(weights)
    if width is None and weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights}: no such weights (options: {', '.join(_WEIGHTS)}, ema:WIDTH)")
    if Path(path).is_file():
        return single.load(Path(path), device=device)
    checkpoint = _find(Path(path))
    state = read_state(checkpoint, "config", "samples")
    stem = f"ema-{width:g}" if width else _choose(checkpoint, _WEIGHTS[weights], state["files"])
    try:
        run = from_flat(state["config"])
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: its configuration is not one of this version: {error}") from None
    model = adapted(run, build(Architecture.of(run), seed=None)).to_empty(device=device)  # all values come from the file
    if width:
        tensors = snapshots.average(checkpoint, run.ema, samples=state["samples"], width=width)
    else:
        tensors = read_tensors(checkpoint, stem, device=device)
    load_weights(model, tensors, source=checkpoint / f"{stem}.safetensors")
    model = merged(model)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return Loaded(run=run, model=model.eval(), samples=state["samples"], folder=folder, checkpoint=checkpoint, weights=stem)


def _find(path: Path) -> Path:
    """The checkpoint folder that `path` means."""
    if not path.exists():
        raise CheckpointError(f"ckpt={path}: no such folder; name a run folder (runs/NAME) or one of its checkpoints")
    if (path / "checkpoints").is_dir():
        found = latest(path)
        if found is None:
            raise CheckpointError(f"ckpt={path}: holds no complete checkpoint; train the run first")
        return found
    if not path.is_dir() or not list(path.glob("*.safetensors")):
        raise CheckpointError(f"ckpt={path}: is neither a run folder nor a checkpoint; name runs/NAME or one of its checkpoints")
    if (reason := damage(path)) is not None:
        raise CheckpointError(f"ckpt={path}: is damaged ({reason}); use another checkpoint of this run")
    return path


def _choose(checkpoint: Path, stems: Sequence[str], files: Mapping[str, Any]) -> str:
    for stem in stems:
        if f"{stem}.safetensors" in files:
            return stem
    kept = ", ".join(files)
    raise CheckpointError(f"{checkpoint}: has no {stems[0]}.safetensors, that average was switched off (there are {kept})")


def _folders(parent: Path) -> list[Path]:
    return sorted((path for path in parent.glob("samples-*") if path.is_dir()), key=_samples)


def _samples(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
