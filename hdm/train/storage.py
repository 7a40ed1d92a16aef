"""Whole tensors in safetensors as a storage of torch.distributed.checkpoint, whoever holds which part of them.

The planners of torch say which process writes which part of which tensor, and which parts a process reads for the tensors that it
holds. Here each process writes its parts at their places in files that all share, and reads what it needs of them: nobody ever
holds more than its own, and the files do not tell how many wrote. Keys are FILE.TENSOR. (The storage that comes with torch keeps
what it knows of the tensors in a pickle; a header of safetensors says the same.)
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

_DTYPES = {  # in the order in which safetensors lays them out, so that all are aligned
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = list(_NAMES)
_ALIGNMENT = 8  # bytes of the header, which its length in as many bytes precedes

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises OSError or SafetensorError for a file that is none."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        return {name: Stored(_DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in found.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer(StorageWriter):
    """Writes `files` (without their endings) of a checkpoint into `folder`, which is emptied first, and then calls `seal`.

    The first process makes the files, all write, and when every part is on the disk the first one seals them.
    """

    def __init__(self, folder: Path, files: Iterable[str], seal: Callable[[], None]) -> None:
        self.folder, self.files, self.seal = folder, list(files), seal

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """The folder is given to the constructor."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the files, with their headers, and tell everybody where each tensor begins."""
        files: dict[str, dict[str, Stored]] = {file: {} for file in self.files}
        for item in (item for plan in plans for item in plan.items):
            file, name = _split(item.index.fqn, self.files)
            files[file][name] = _stored(item)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        begins: dict[str, int] = {}
        for file, tensors in files.items():
            for name, begin in _create(self.folder / f"{file}.safetensors", tensors).items():
                begins[f"{file}.{name}"] = begin
        return [replace(plan, storage_data=begins) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts that this process has, and wait for the disk."""
        items: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            items.setdefault(_split(item.index.fqn, self.files)[0], []).append(item)
        results = []
        for stem, group in items.items():
            with open(self.folder / f"{stem}.safetensors", "r+b") as file:
                for item in group:
                    tensor, begin = planner.resolve_data(item), plan.storage_data[item.index.fqn]
                    assert isinstance(tensor, Tensor)
                    results.append(WriteResult(item.index, _put(file, item, tensor, begin), None))
                file.flush()
                os.fsync(file.fileno())
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Every process is done."""
        self.seal()


def _stored(item: WriteItem) -> Stored:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn}: is not a tensor")
    return Stored(item.tensor_data.properties.dtype, tuple(item.tensor_data.size))


def _create(path: Path, tensors: Mapping[str, Stored]) -> dict[str, int]:
    """Make a file with room for `tensors`; returns where each of them begins. As safetensors itself lays them out."""
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name)):
        dtype, shape = tensors[name].dtype, tensors[name].shape
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [end, end + tensors[name].bytes]}
        end += tensors[name].bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = _ALIGNMENT + len(text)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(_ALIGNMENT, "little") + text)
        file.truncate(start + end)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def _put(file: Any, item: WriteItem, tensor: Tensor, begin: int) -> int:
    """Write a part of a tensor that begins at byte `begin`; returns its size."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    stored, chunk, at = _stored(item), item.tensor_data.chunk, 0  # type: ignore[union-attr]
    for first, count in runs(stored.shape, tuple(chunk.offsets), tuple(chunk.sizes)):
        size = count * stored.dtype.itemsize
        file.seek(begin + first * stored.dtype.itemsize)
        file.write(data[at : at + size])
        at += size
    return at


def runs(shape: Shape, offsets: Shape, sizes: Shape) -> Iterator[tuple[int, int]]:
    """Where the elements of a box at `offsets` lie in a tensor of `shape`, row by row: (first, count) of those without a gap."""
    if 0 in sizes:
        return
    inner = len(shape)  # dimensions from here on are covered wholly
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)  # the last one that is cut still lies in one piece
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    start = sum(offset * stride for offset, stride in zip(offsets, strides))
    for index in np.ndindex(*sizes[:outer]):
        yield start + sum(i * stride for i, stride in zip(index, strides)), math.prod(sizes[outer:])


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader(StorageReader):
    """Reads `files` (without their endings) of checkpoint `folder`: of each tensor the parts that this process holds."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder, self.files = folder, list(files)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """The folder is given to the constructor."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor, whole."""
        tensors: dict[str, Any] = {}
        for stem in self.files:
            for name, stored in layout(self.folder / f"{stem}.safetensors").items():
                size = torch.Size(stored.shape)
                chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
                properties = TensorProperties(dtype=stored.dtype)
                tensors[f"{stem}.{name}"] = TensorStorageMetadata(properties=properties, size=size, chunks=[chunk])
        return Metadata(state_dict_metadata=tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned parts into the tensors of this process."""
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(_split(item.storage_index.fqn, self.files)[0], []).append(item)
        for stem, group in items.items():
            with safe_open(self.folder / f"{stem}.safetensors", framework="pt") as file:
                for item in group:
                    _, name = _split(item.storage_index.fqn, self.files)
                    box = tuple(slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_slice(name)[box] if box else file.get_tensor(name))
                    planner.commit_tensor(item, target)
        return _done(None)


def _split(key: str, files: Iterable[str]) -> tuple[str, str]:
    """The file of a key and the tensor's name there; a file's name may hold dots, as ema-power-0.05 does."""
    file = max((file for file in files if key.startswith(f"{file}.")), key=len)
    return file, key[len(file) + 1 :]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
