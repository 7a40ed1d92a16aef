"""Parts of tensors in shared safetensors files."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_run import WHOLE
from safetensors.torch import load_file, save_file

from hdm.config.errors import CheckpointError
from hdm.train.checkpoint import Writer, damage, latest, read_into, save
from hdm.train.parallel import World
from hdm.train.storage import _DTYPES, Stored, layout, runs

HERE = Path(__file__).parent


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets)]
    return tuple(shape), tuple(offsets), tuple(sizes)


@given(box=boxes())
def test_runs_are_the_elements_of_the_box_in_order(box):
    shape, offsets, sizes = box
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    part = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))]
    found = [first + i for first, count in runs(shape, offsets, sizes) for i in range(count)]
    assert found == part.ravel().tolist()


def test_rows_lie_in_one_piece():
    assert list(runs((6, 4, 2), (2, 0, 0), (3, 4, 2))) == [(16, 24)]
    assert list(runs((6, 4), (0, 1), (2, 2))) == [(1, 2), (5, 2)]
    assert list(runs((), (), ())) == [(0, 1)]


def tensors():
    draw = torch.Generator().manual_seed(0)
    found = {f"t{i}": torch.randn(3, 5, generator=draw).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16))}
    found |= {"a": torch.tensor(7), "Z/é": torch.arange(4, dtype=torch.uint8), "none": torch.empty(0, 3), "b": torch.tensor([True])}
    return found | {f"{dtype}": torch.ones(2, 2).to(dtype) for dtype in _DTYPES.values()}


def test_files_are_those_of_safetensors_to_the_byte(tmp_path):
    save_file(tensors(), tmp_path / "theirs.safetensors")
    save(tmp_path, samples=0, tensors={"model": tensors()}, state={}, keep=1)
    ours = tmp_path / "checkpoints" / "samples-000000000" / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert layout(ours) == {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors().items()}


def test_what_is_saved_may_change_at_once(tmp_path):
    """Training goes on while a checkpoint of 40 MB is on its way."""
    weight = torch.full((10_000_000,), 1.0)
    with Writer(None) as writer:
        for samples in (1, 2, 3):
            writer.submit(tmp_path, samples=samples, tensors={"model": {"weight": weight}}, state={}, keep=5)
            weight += 1.0
    for samples in (1, 2, 3):
        stored = load_file(tmp_path / "checkpoints" / f"samples-{samples:09d}" / "model.safetensors")["weight"]
        assert (stored == samples).all()


def test_names_of_files_may_hold_dots(tmp_path):
    files = {name: {"a.b": torch.full((2,), float(i))} for i, name in enumerate(("ema", "ema-0", "ema-0.05", "ema-0.1"))}
    path = save(tmp_path, samples=0, tensors={**files, "optimizer": {}}, state={}, keep=1)
    for name, group in files.items():
        assert torch.equal(load_file(path / f"{name}.safetensors")["a.b"], group["a.b"])
    assert load_file(path / "optimizer.safetensors") == {}
    room = {name: {"a.b": torch.zeros(2)} for name in files}
    read_into(path, room, world=World())
    assert all(torch.equal(room[name]["a.b"], files[name]["a.b"]) for name in files)


def test_tensors_are_filled_in_place(tmp_path):
    path = save(tmp_path, samples=0, tensors={"model": tensors(), "ema": tensors()}, state={}, keep=1)
    room = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    storage = {name: tensor.data_ptr() for name, tensor in room.items()}
    read_into(path, {"ema": room}, world=World())
    for name, tensor in tensors().items():
        assert torch.equal(room[name], tensor), name
        assert room[name].data_ptr() == storage[name]
    with pytest.raises(CheckpointError, match=r"model.safetensors: has no tensor 'a' of shape \(2,\)"):
        read_into(path, {"model": {"a": torch.zeros(2)}}, world=World())
    (path / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"ema.safetensors: not readable: .*use another checkpoint"):
        read_into(path, {"ema": room}, world=World())


# --- several processes ------------------------------------------------------------------------------------------------


def two_processes(folder, ending):
    """What each of them says at the end; None of one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "parts_run.py", str(folder), ending],
            env={**environment, "RANK": str(rank), "MASTER_PORT": str(port)},
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.wait(timeout=120)
    paths = [folder / f"said-{rank}" for rank in (0, 1)]
    return [path.read_text() if path.exists() else None for path in paths]


def test_each_process_writes_and_reads_its_own_parts(tmp_path):
    """In the files that one process would write; and what is saved may change at once."""
    first, second = (json.loads(said) for said in two_processes(tmp_path, "saved"))
    assert first == [
        "model.all[0]", "model.columns[0, 0, 0]", "model.one[0, 0]", "model.plain[]", "model.rows[0, 0]"
    ]  # fmt: skip
    assert [part for part in second if "one" not in part] == ["model.columns[0, 2, 0]", "model.rows[3, 0]"]
    save_file({**WHOLE, "plain": torch.tensor(3)}, tmp_path / "theirs.safetensors")
    path = tmp_path / "checkpoints" / "samples-000000008"
    assert damage(path) is None
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert load_file(path / "optimizer.safetensors") == {}


def test_a_disk_that_is_full_for_one_process_is_said_by_both(tmp_path):
    for said in two_processes(tmp_path, "full"):
        assert re.fullmatch(r"CheckpointError: .*samples-000000008: cannot be saved: File too large; it needs 0 MB\. .*", said)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_folder_that_only_one_process_sees(tmp_path):
    first, second = two_processes(tmp_path, "elsewhere")
    words = "cannot be saved: No such file or directory; it needs 0 MB. Put the run folder where every process sees it and give"
    assert words in first
    assert words in second
    assert latest(tmp_path) is None


def test_a_process_that_dies_while_it_writes_is_missed_and_leaves_no_checkpoint(tmp_path):
    first, second = two_processes(tmp_path, "killed")
    assert second is None
    assert first.startswith("LostProcess: another process of this run is gone")
    assert latest(tmp_path) is None
