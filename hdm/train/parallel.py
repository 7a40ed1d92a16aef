"""Several processes as one run. Distribution is applied from outside: the network and its objective know nothing of it.

Processes are started by torchrun, or by anything else that sets its variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT). Each takes an equal part of every micro-batch, so the global batch, its samples and their draws are those of one
process; gradients are averages over all. Process 0 writes, and of tensors that are spread each process its part.

DDP: every process holds the whole network. FSDP2 (`fully_shard`): weights, gradients, averages and moments are split over the
processes, block by block; tensors are then DTensors, which `whole` gathers.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hdm.config.check import require
from hdm.config.errors import ConfigError, LostProcess
from hdm.config.schema import Compression, ParallelConfig, RunConfig, Strategy
from hdm.model.backbone import Backbone
from hdm.model.block import Block


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train one run together; `rank` is this one.

    `control` is their group for words between hosts, `saving` that of what is written beside the training.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: Any = None
    saving: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """(rank, size)."""
        return self.rank, self.size

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all processes; all must ask."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, group=self.control)
        return numbers.tolist()

    def any(self, word: bool) -> bool:
        """Whether any process says so; all must ask."""
        return self.summed([float(word)])[0] > 0

    def gathered(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks; all must ask. For host values, not for tensors of a size."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.size)


@contextmanager
def world(run: RunConfig, device: torch.device) -> Iterator[World]:
    """The processes of this run, joined while the context lasts; just this one where nobody started more.

    `device` is what the configuration asks for; of several accelerators each process takes its own. Raises ConfigError for a batch
    that cannot be met exactly by so many processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for stage_name, train in _batches(run):
        unit = size * train.accumulation
        require(
            train.batch_size % unit == 0,
            f"{stage_name}train.batch_size={train.batch_size}: {size} processes x train.accumulation={train.accumulation} do not"
            f" divide it; the nearest that works is {max(round(train.batch_size / unit), 1) * unit}",
        )
    if size == 1:
        yield World(device=device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    patience = timedelta(minutes=run.parallel.timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        # waiting for a word from the hosts must not wait for the accelerators
        control = dist.new_group(backend="gloo", timeout=patience)
        saving = dist.new_group(backend="gloo", timeout=patience)
        yield World(rank=rank, size=size, device=device, control=control, saving=saving)
    finally:
        dist.destroy_process_group()


def processes() -> tuple[int, int]:
    """(rank, size) as the launcher says, before anything is joined."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _batches(run: RunConfig) -> Iterator[tuple[str, Any]]:
    from hdm.config.compose import stage_run

    if not run.stages:
        yield "", run.train
    for stage in run.stages:
        yield f"stages.{stage.name}.", stage_run(run, stage).train


_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "nccl", "gloo")


@contextmanager
def together(size: int) -> Iterator[None]:
    """Turn what an exchange with another process raises when that one is gone into a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if size == 1 or not (isinstance(error, dist.DistError) or any(word in text.lower() for word in _GONE)):
            raise
        raise LostProcess(
            f"another process of this run is gone ({text[:160]}); its own last lines say why. The same command continues from the"
            " last checkpoint"
        ) from None


# --- the network ------------------------------------------------------------------------------------------------------


def spread(model: Backbone, beside: nn.Module, config: ParallelConfig, world: World) -> None:
    """Shard `model`, and what is trained `beside` it, over the processes where that is asked for, and compile its blocks.

    In place; the names of parameters stay.
    """
    blocks = _outermost(model)
    if config.compile:
        # Text is as long as the longest caption: the second length makes that axis a symbol, and no length compiles again. Blocks
        # that are alike share their code, and its limit: each kind, with and without gradients, is compiled for both.
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.compile()
    if world.size > 1 and config.strategy is Strategy.fsdp:
        # nothing is done in place to a velocity, of which FSDP2 warns in every step
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for child in beside.children():
            fully_shard(child, mesh=mesh)


def _outermost(model: nn.Module) -> list[Block]:
    """The blocks that are not inside another one."""
    found: list[Block] = []
    for child in model.children():
        found += [child] if isinstance(child, Block) else _outermost(child)
    return found


def reshard(model: nn.Module) -> None:
    """Let go of the whole tensors that a forward pass of FSDP2 leaves behind; parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Replica(nn.parallel.DistributedDataParallel):
    """A network whose gradients are averaged over the processes in the backward pass; otherwise it is the network inside."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicated(model: Backbone, config: ParallelConfig, world: World) -> Backbone | Replica:
    """What the training step calls: `model` itself, or under DDP its replica."""
    if world.size == 1 or config.strategy is Strategy.fsdp:
        return model
    where = [world.device.index] if world.device.type == "cuda" else None
    # the token that stands for removed ones is not used where none are removed
    unused = any(True for _ in getattr(model, "routing", nn.Module()).parameters())
    replica = Replica(model, device_ids=where, gradient_as_bucket_view=True, find_unused_parameters=unused)
    if config.compress is not Compression.none:
        require(
            config.compress is Compression.fp16 or world.device.type == "cuda",
            "parallel.compress=bf16: needs accelerators that exchange bf16; use parallel.compress=fp16 or none",
        )
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        hooks = {Compression.fp16: default_hooks.fp16_compress_hook, Compression.bf16: default_hooks.bf16_compress_hook}
        replica.register_comm_hook(None, hooks[config.compress])
    return replica


def last_only(model: nn.Module, beside: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch's backward pass: gradients are exchanged with the `last` one of a step."""
    for module in (model, *beside.children()):
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, Replica) and not last else nullcontext()


# --- tensors ----------------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_optimizer(run: RunConfig) -> None:
    """Raise ConfigError for an optimizer that needs whole matrices where they are sharded."""
    from hdm.config.axes import OPTIMIZER

    if run.parallel.strategy is Strategy.fsdp and processes()[1] > 1 and OPTIMIZER.of(run.optimizer).name == "muon":
        raise ConfigError(
            "optimizer=muon: orthogonalizes whole matrices, which parallel.strategy=fsdp shards; use parallel.strategy=ddp"
        )
