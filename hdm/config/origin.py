"""Which weights `init_from` means: found, and named by their digest, before torch is imported.

The digest is part of what the run is: other weights under the same path make another run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm.config.errors import ConfigError
from hdm.config.schema import RunConfig, Weights
from hdm.files import sha256

FILES = {
    Weights.ema: ("ema-power", "ema-decay", "model"),
    Weights.raw: ("model",),
    Weights.ema_decay: ("ema-decay",),
}


@dataclass(kw_only=True, slots=True)
class Origin:
    """Weights to start from: the checkpoint folder or single file that holds them, and their digest."""

    path: Path
    digest: str


def with_origin(run: RunConfig) -> RunConfig:
    """`run` with `init_digest`, unless it has one already: what is read back from a file stays the run that it was."""
    if run.init_from and not run.init_digest:
        run.init_digest = find(run).digest
    return run


def find(run: RunConfig) -> Origin:
    """What `init_from` names now. Raises ConfigError, in one line, when there are no such weights."""
    path = Path(str(run.init_from)).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(f"init_from={path}: is no .safetensors; nothing else is read, a pickle least of all")
        return Origin(path=path, digest=sha256(path)[:16])
    folders = sorted((path / "checkpoints").glob("samples-*"), reverse=True) if (path / "checkpoints").is_dir() else [path]
    for folder in folders:
        if (files := _files(folder)) is not None:
            name = next((f"{stem}.safetensors" for stem in FILES[run.init_weights] if f"{stem}.safetensors" in files), None)
            if name is None:
                raise ConfigError(
                    f"init_weights={run.init_weights.name}: {folder} has none, that average was switched off"
                    f" (there are {', '.join(files)})"
                )
            return Origin(path=folder, digest=str(files[name]["sha256"])[:16])
    raise ConfigError(
        f"init_from={path}: {'holds no complete checkpoint' if path.is_dir() else 'no such file or folder'}; name a run folder"
        " (runs/NAME), one of its checkpoints, or a .safetensors file"
    )


def _files(folder: Path) -> dict[str, Any] | None:
    """What state.json of a checkpoint says of its files, when they are all there in their full size."""
    try:
        files: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
        whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if whole else None
