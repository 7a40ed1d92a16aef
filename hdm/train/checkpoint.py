"""Checkpoints: folders of safetensors that are complete or not there.

    checkpoints/samples-000001024/{model,ema-power,ema-decay,optimizer}.safetensors + state.json

Everything is written into a hidden sibling folder and forced to the disk; state.json comes last and holds the size and digest of
every file; then the folder is renamed into place. Whatever kills the process, no earlier checkpoint is touched.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdm.config.compose import from_flat
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.schema import RunConfig
from hdm.files import sha256
from hdm.model.backbone import Architecture, Backbone
from hdm.train.parallel import placed

FORMAT = 1
_WEIGHTS = {"ema": ("ema-power", "ema-decay", "model"), "raw": ("model",), "ema_decay": ("ema-decay",)}

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(kw_only=True, slots=True)
class Loaded:
    """A trained network. `folder` is its run folder, `weights` the file that was read: ema-power, ema-decay or model."""

    run: RunConfig
    model: Backbone
    samples: int
    folder: Path
    weights: str


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes the checkpoints of a run from a thread: training waits for a copy of the tensors, not for the disk.

    Used as a context, which ends when the last one is written. An error shows at the next checkpoint, or at the end.
    """

    def __init__(self, newest: Path | None) -> None:
        self.newest = newest
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()

    def submit(self, folder: Path, *, tensors: Tensors, **options: Any) -> None:
        """`save`, soon: the tensors may change when this returns. Raises CheckpointError when the one before could not be saved."""
        self.wait()
        copies = {stem: {name: self._copy(stem, name, tensor) for name, tensor in group.items()} for stem, group in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        def work() -> None:
            try:
                self.newest = save(folder, tensors=copies, **options)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is on the disk. Raises CheckpointError when it could not be saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor in memory of the host that is kept from one checkpoint to the next."""
        tensor = tensor.detach()
        copy = self._copies.get((stem, name))
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._copies[stem, name] = copy
        return copy.copy_(tensor, non_blocking=True)


def save(folder: Path, *, samples: int, tensors: Tensors, state: Mapping[str, Any], keep: int, milestone: bool = False) -> Path:
    """Write `tensors` (file stem -> name -> tensor) and `state` as the checkpoint of run `folder` at `samples`; drop old ones.

    Keeps the `keep` newest, the one of the initial weights, and those that were saved as a `milestone`. Raises CheckpointError when
    the disk is full or not writable; the checkpoints that are there stay as they are.
    """
    target = folder / "checkpoints" / name_at(samples)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        _write(temporary, tensors, {**state, "milestone": milestone})
        if target.exists():  # a damaged one that was passed over
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_unsaved(target, tensors, error)) from None
    _prune(target, keep)
    return target


def name_at(samples: int) -> str:
    """The name of the checkpoint at `samples` seen."""
    return f"samples-{samples:09d}"


def _write(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = {}
    for stem, group in tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in group.items()}, path)
        path.chmod(0o644)  # safetensors makes it private
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    path = folder / "state.json"
    path.write_text(json.dumps({"format": FORMAT, **state, "files": files}, indent=1), encoding="utf-8")
    _sync(path)
    _sync(folder)


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


def _unsaved(target: Path, tensors: Tensors, error: Exception) -> str:
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) / 1e6
    reason = str(error).split("I/O error: ")[-1].split(" (os error")[0]
    earlier = [p.name for p in _folders(target.parent) if _samples(p) < _samples(target)]
    return (
        f"{target}: cannot be saved: {reason}; it needs {size:,.0f} MB. Free some space and give the same command again;"
        f" it continues from {earlier[-1] if earlier else 'the beginning'}"
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
        raise CheckpointError(f"{file}: not readable: {' '.join(str(error).split())}; use another checkpoint") from None


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy `tensors` into `model`. Raises CheckpointError naming the first tensor that is missing, unknown or of another shape."""
    own = model.state_dict()
    remedy = "the file is of another architecture; load it with the configuration that wrote it (config.json of its run)"
    for name in [*own, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"{source}: has no tensor '{name}', which the network has; {remedy}")
        if name not in own:
            raise CheckpointError(f"{source}: holds tensor '{name}', which the network does not have; {remedy}")
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} there and {tuple(own[name].shape)} in the network"
            raise CheckpointError(f"{source}: '{name}' has shape {shapes}; {remedy}")
    model.load_state_dict({name: placed(tensor, own[name]) for name, tensor in tensors.items()})


def load_model(path: str | Path, *, weights: str = "ema", device: torch.device | str = "cpu") -> Loaded:
    """The network of a run folder (its newest complete checkpoint), of one checkpoint folder or of an exported file, in eval mode.

    `weights`: "ema" (the power-function average, else the plain one, else raw), "raw" or "ema_decay". Raises CheckpointError, in
    one line, for a path that is no checkpoint, a damaged one, or one that does not fit its configuration.
    """
    from hdm.model import build
    from hdm.train import single
    from hdm.train.adapters import adapted, merged

    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights}: no such weights (options: {', '.join(_WEIGHTS)})")
    if Path(path).is_file():
        return single.load(Path(path), device=device)
    checkpoint = _find(Path(path))
    state = read_state(checkpoint, "config", "samples")
    stem = _choose(checkpoint, _WEIGHTS[weights], state["files"])
    try:
        run = from_flat(state["config"])
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: its configuration is not one of this version: {error}") from None
    model = adapted(run, build(Architecture.of(run), seed=None)).to_empty(device=device)  # all values come from the file
    load_weights(model, read_tensors(checkpoint, stem, device=device), source=checkpoint / f"{stem}.safetensors")
    model = merged(model)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return Loaded(run=run, model=model.eval(), samples=state["samples"], folder=folder, weights=stem)


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
