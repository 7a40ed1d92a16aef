"""All that training changes: weights, averages, optimizer moments and the clock. A restored run goes on to the bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hdm.config.axes import OPTIMIZER
from hdm.config.compose import flatten
from hdm.config.errors import CheckpointError, DataError
from hdm.config.schema import Moments, RunConfig
from hdm.model.backbone import Backbone
from hdm.train import checkpoint
from hdm.train.budget import Clock
from hdm.train.checkpoint import OTHER_VERSION
from hdm.train.ema import Averages
from hdm.train.optimizer import Optimizer
from hdm.train.parallel import World


@dataclass(kw_only=True, slots=True)
class TrainState:
    """The state of a run between two steps; `data` holds the digests of what it is trained and validated on.

    `alignment` is trained with the model and stored in a file of its own, where it has parameters: what loads the model never sees
    it, and the averages do not cover it.
    """

    model: Backbone
    optimizer: Optimizer
    averages: Averages
    data: dict[str, str]
    alignment: nn.Module = field(default_factory=nn.Module)
    clock: Clock = field(default_factory=Clock)
    skipped: int = 0

    @classmethod
    def initial(cls, run: RunConfig, model: Backbone, *, data: dict[str, str], alignment: nn.Module | None = None) -> "TrainState":
        """The state before the first step."""
        beside = alignment or nn.Module()
        trained = nn.ModuleDict({"model": model, "alignment": beside}) if has_parameters(beside) else model
        optimizer = OPTIMIZER.build(run.optimizer, trained)
        averages = Averages(model, run.ema, weights=optimizer.evaluated(model))
        return cls(model=model, optimizer=optimizer, averages=averages, data=data, alignment=beside)

    @property
    def name(self) -> str:
        """The name of the checkpoint of this moment."""
        return checkpoint.name_at(self.clock.samples)

    def save(self, folder: Path, run: RunConfig, *, writer: checkpoint.Writer, stage: int = 0, milestone: bool = False) -> None:
        """Have the checkpoint of this moment written into run `folder`; all processes must ask.

        `stage` is the one that was trained last; a `milestone` is kept for good.
        """
        averages = {f"ema-{name}": self.averages.state(name) for name in self.averages.tensors}
        weights = dict(zip(self.averages.names, self.averages.weights, strict=True))
        groups = {"model": weights, **averages, "optimizer": self._moments()}
        if has_parameters(self.alignment):
            groups["alignment"] = self.alignment.state_dict()
        clock, keep = asdict(self.clock), run.train.keep_checkpoints
        state = {**clock, "stage": stage, "skipped": self.skipped, "data": self.data, "config": flatten(run)}
        writer.submit(folder, samples=self.clock.samples, tensors=groups, state=state, keep=keep, milestone=milestone)

    def restore(self, path: Path, *, world: World, stage: int = 0, moments: Moments = Moments.keep) -> None:
        """Become the state that checkpoint `path` holds, however many processes wrote it; all must ask.

        Raises CheckpointError when it does not fit, DataError for other data.

        Where it was saved at the end of the stage before `stage`, the optimizer's state is left out unless `moments` says keep.
        """
        state = checkpoint.read_state(path, "steps", "samples", "flops", "seconds", "skipped", "data")
        state = {"device_seconds": state["seconds"], **state}  # which older checkpoints do not say
        begins = state.get("stage", 0) != stage
        for split, digest in ({} if begins else self.data).items():
            if (then := state["data"].get(split)) != digest:
                raise DataError(
                    f"{path}: the {split} data have changed since (digest {str(then)[:8]} then, {digest[:8]} now);"
                    " put them back, or start a new run with another name="
                )
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for stem, module in (("model", self.model), ("alignment", self.alignment)):
            if has_parameters(module):
                stored = checkpoint.read_layout(path, stem)
                shapes = {name: tensor.shape for name, tensor in stored.items()}
                checkpoint.check_weights(module, shapes, source=path / f"{stem}.safetensors")
                tensors[stem] = module.state_dict()
        for name, own in self.averages.tensors.items():
            tensors[f"ema-{name}"] = dict(zip(self.averages.names, own, strict=True))
        if not begins or moments is Moments.keep:
            tensors["optimizer"] = self._room_for_moments(path)
        checkpoint.read_into(path, tensors, world=world)
        self.optimizer.reloaded()
        self.clock = Clock(**{name: state[name] for name in asdict(self.clock)})
        self.skipped = state["skipped"]

    def _parameters(self) -> dict[str, nn.Parameter]:
        beside = {f"alignment.{name}": parameter for name, parameter in self.alignment.named_parameters()}
        return dict(self.model.named_parameters()) | beside

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's state as "parameter name/entry" -> tensor."""
        named = {id(parameter): name for name, parameter in self._parameters().items()}
        return {
            f"{named[id(parameter)]}/{entry}": tensor
            for parameter, entries in self.optimizer.state.items()
            for entry, tensor in entries.items()
        }

    def _room_for_moments(self, path: Path) -> dict[str, Tensor]:
        """Make the optimizer's state anew with the entries that checkpoint `path` has, to be filled from there."""
        parameters = self._parameters()
        self.optimizer.state.clear()
        for key, stored in checkpoint.read_layout(path, "optimizer").items():
            name, _, entry = key.rpartition("/")
            if name not in parameters:
                source = path / "optimizer.safetensors"
                raise CheckpointError(f"{source}: holds moments of '{name}', which the network does not have; {OTHER_VERSION}")
            own, dtype = parameters[name].detach(), stored.dtype
            alike = stored.shape == tuple(own.shape)  # then it is spread over the processes as the parameter is
            room = torch.empty_like(own, dtype=dtype) if alike else torch.empty(stored.shape, dtype=dtype, device=own.device)
            self.optimizer.state.setdefault(parameters[name], {})[entry] = room
        return self._moments()


def has_parameters(module: nn.Module) -> bool:
    """Whether `module` has anything to train."""
    return next(module.parameters(), None) is not None
