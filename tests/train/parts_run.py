"""Two processes that hold parts of tensors save them together and read them otherwise spread; `test_storage.py` starts them."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hdm.config.errors import CheckpointError, LostProcess
from hdm.train import storage
from hdm.train.checkpoint import Writer, read_into
from hdm.train.parallel import World, together

WHOLE = {
    "rows": torch.arange(10.0).view(5, 2),  # 3 and 2 of them
    "one": torch.arange(3.0).view(1, 3),  # the second process has none
    "columns": torch.arange(24.0).view(3, 4, 2).to(torch.bfloat16),
    "all": torch.arange(6.0),
}
PLACES = {"rows": Shard(0), "one": Shard(0), "columns": Shard(1), "all": Replicate()}


def main(folder: Path, ending: str) -> str:
    """What became of it, in one line."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = World(rank=rank, size=2, control=dist.new_group(backend="gloo"), saving=dist.new_group(backend="gloo"))
    mesh = init_device_mesh("cpu", (2,))
    spread = {name: distribute_tensor(tensor.clone(), mesh, [PLACES[name]]) for name, tensor in WHOLE.items()}
    tensors = {"model": {**spread, "plain": torch.tensor(3)}, "optimizer": {}}
    written: list[str] = []
    put = storage._put

    def counted(file, item, *args):
        if ending == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(f"{item.index.fqn}{list(item.tensor_data.chunk.offsets)}")
        return put(file, item, *args)

    storage._put = counted
    if ending == "elsewhere" and rank == 1:
        folder = folder / "of another host"
    if ending == "full" and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
    try:
        with together(2), Writer(None, world) as writer:
            writer.submit(folder, samples=8, tensors=tensors, state={}, keep=1)
            time.sleep(0.1)
            for tensor in spread.values():
                tensor.to_local().fill_(-1.0)  # training goes on
    except (CheckpointError, LostProcess) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return f"{type(error).__name__}: {error}"
    places = {"rows": Replicate(), "one": Shard(1), "columns": Shard(0), "all": Shard(0)}
    room = {name: distribute_tensor(torch.zeros_like(tensor), mesh, [places[name]]) for name, tensor in WHOLE.items()}
    plain = torch.tensor(0)
    read_into(writer.newest, {"model": {**room, "plain": plain}}, world=world)
    assert all(torch.equal(room[name].full_tensor(), tensor) for name, tensor in WHOLE.items())
    assert plain == 3
    return json.dumps(sorted(written))


if __name__ == "__main__":
    said = main(Path(sys.argv[1]), sys.argv[2])
    (Path(sys.argv[1]) / f"said-{os.environ['RANK']}").write_text(said)
    os._exit(0)  # without waiting for a process that is gone
