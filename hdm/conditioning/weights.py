"""Pretrained networks, from a folder, the hub's cache or the hub.

Only safetensors are read, never a pickle, and no code that comes with weights is run. What is missing is said in one line.
"""

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hdm.config.errors import AssetError, ConfigError, HdmError
from hdm.config.schema import Dtype

T = TypeVar("T")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_TIMEOUT_S = 10.0


def torch_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The torch type that `dtype` means on `device`."""
    if dtype is Dtype.auto:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}[dtype]


@dataclass(kw_only=True, slots=True)
class Source:
    """Where a pretrained network comes from. `axis` names the configuration group in messages; `path` is a folder or a hub id."""

    axis: str
    path: str
    revision: str | None = None

    def load(self, read: Callable[..., T]) -> T:
        """Return `read(path, local_files_only=…, …)`, from the first place that has the files.

        The hub is asked only for what its cache lacks, so that a run which has its weights starts without a network. Raises
        AssetError when they cannot be had or are damaged.
        """
        folder = Path(self.path).expanduser()
        if self.path and folder.is_dir():
            return self._read(read, str(folder), local_files_only=True)
        if not _HUB_ID.fullmatch(self.path):
            raise AssetError(
                f"{self.axis}.path={self.path}: no such folder; give one with config.json and *.safetensors, or a hub id OWNER/NAME"
            )
        revision = {} if self.revision is None else {"revision": self.revision}
        try:
            return self._read(read, self.path, local_files_only=True, **revision)
        except AssetError as error:
            if not isinstance(error.__cause__, OSError):  # cached, but of no use: the hub has nothing else
                raise
        self._require_hub()
        return self._read(read, self.path, local_files_only=False, **revision)

    def _read(self, read: Callable[..., T], path: str, *, local_files_only: bool, **options: Any) -> T:
        try:
            return read(path, local_files_only=local_files_only, **options)
        except HdmError:
            raise
        except Exception as error:  # for bad files the libraries raise OSError, ValueError, RuntimeError, SafetensorError …
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise AssetError(
                f"{self.axis}.path={path}: cannot be loaded: {reason}; needed are config.json and *.safetensors"
                " (pickles such as *.bin are not read)"
            ) from error

    def _require_hub(self) -> None:
        """Ask the hub once, since the libraries themselves retry for a minute before they give up."""
        from huggingface_hub import HfApi, constants

        try:
            HfApi().model_info(self.path, revision=self.revision, timeout=_HUB_TIMEOUT_S)
        except Exception as error:
            revision = "" if self.revision is None else f" at revision {self.revision}"
            raise AssetError(
                f"{self.axis}.path={self.path}{revision}: not in the hub cache ({constants.HF_HUB_CACHE}), and the hub does not"
                f" give it ({type(error).__name__}); run `hf download {self.path}` where there is a network (after `hf auth login`"
                f" if it is gated), or set {self.axis}.path=FOLDER to a copy"
            ) from error


def read_network(cls: Any, path: str, **options: Any) -> Any:
    """Call `cls.from_pretrained` for safetensors; the network is frozen, in eval mode, on the CPU.

    Raises AssetError when weights are missing, which the libraries would fill with noise. A pooler is not used here and may be.
    """
    if options.get("local_files_only") and cls.__module__.startswith("transformers"):
        # where peft is installed transformers looks for adapters too, and asks the hub for them unless it is told not to
        options["adapter_kwargs"] = {"local_files_only": True}
    with _quiet(cls) if options.get("local_files_only") else contextlib.nullcontext():
        network, info = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise AssetError(
            f"{path}: lacks {len(missing)} weights of {cls.__name__}, such as {missing[0]}; it holds another kind of network"
        )
    return network.requires_grad_(False).eval()


@contextlib.contextmanager
def compiling(axis: str, wanted: bool) -> Iterator[None]:
    """Around the passes of a network that torch.compile may fail on: one line instead of its pages. Raises ConfigError."""
    try:
        yield
    except Exception as error:
        if not wanted or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{axis}.compile=true: torch.compile cannot: {reason}; set {axis}.compile=false") from error


@contextlib.contextmanager
def _quiet(cls: Any) -> Iterator[None]:
    """No progress bar and report for files that load within seconds; what matters in them is raised by `read_network`."""
    logging: Any = importlib.import_module(cls.__module__.partition(".")[0] + ".utils.logging")  # of transformers or diffusers
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
