"""All that training changes: weights, averages, optimizer moments and the clock. A restored run goes on to the bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from hdm.config.axes import OPTIMIZER
from hdm.config.compose import flatten
from hdm.config.errors import CheckpointError, DataError
from hdm.config.schema import Moments, RunConfig
from hdm.model.backbone import Backbone
from hdm.train import checkpoint
from hdm.train.budget import Clock
from hdm.train.ema import Averages
from hdm.train.optimizer import Optimizer
from hdm.train.parallel import World, placed, whole

_REMEDY = "it was written by another version; start a new run with another name="


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

    def save(
        self, folder: Path, run: RunConfig, *, writer: checkpoint.Writer, world: World, stage: int = 0, milestone: bool = False
    ) -> None:
        """Have the checkpoint of this moment written into run `folder`; all processes must ask, and the first one writes.

        `stage` is the one that was trained last; a `milestone` is kept for good.
        """
        averages = {f"ema-{name}": self.averages.state(name) for name in self.averages.tensors}
        weights = dict(zip(self.averages.names, self.averages.weights, strict=True))
        groups = {"model": weights, **averages, "optimizer": self._moments()}
        if has_parameters(self.alignment):
            groups["alignment"] = self.alignment.state_dict()
        tensors: dict[str, dict[str, Tensor]] = {stem: {} for stem in groups}
        for stem, group in groups.items():
            for name, tensor in group.items():
                gathered = whole(tensor)
                if world.main:
                    tensors[stem][name] = gathered if gathered is tensor else gathered.cpu()
        if world.main:
            clock, keep = asdict(self.clock), run.train.keep_checkpoints
            state = {**clock, "stage": stage, "skipped": self.skipped, "data": self.data, "config": flatten(run)}
            writer.submit(folder, samples=self.clock.samples, tensors=tensors, state=state, keep=keep, milestone=milestone)

    def restore(self, path: Path, *, stage: int = 0, moments: Moments = Moments.keep) -> None:
        """Become the state that checkpoint `path` holds. Raises CheckpointError when it does not fit, DataError for other data.

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
        checkpoint.load_weights(self.model, checkpoint.read_tensors(path, "model"), source=path / "model.safetensors")
        if has_parameters(self.alignment):
            source = path / "alignment.safetensors"
            checkpoint.load_weights(self.alignment, checkpoint.read_tensors(path, "alignment"), source=source)
        for name, own in self.averages.tensors.items():
            stored = checkpoint.read_tensors(path, f"ema-{name}")
            for key, tensor in zip(self.averages.names, own, strict=True):
                tensor.copy_(placed(_take(stored, key, path / f"ema-{name}.safetensors"), tensor))
        if not begins or moments is Moments.keep:
            self._restore_moments(checkpoint.read_tensors(path, "optimizer"), path / "optimizer.safetensors")
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

    def _restore_moments(self, stored: Mapping[str, Tensor], source: Path) -> None:
        parameters = self._parameters()
        self.optimizer.state.clear()
        for key, tensor in stored.items():
            name, _, entry = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"{source}: holds moments of '{name}', which the network does not have; {_REMEDY}")
            self.optimizer.state.setdefault(parameters[name], {})[entry] = placed(tensor, parameters[name])


def has_parameters(module: nn.Module) -> bool:
    """Whether `module` has anything to train."""
    return next(module.parameters(), None) is not None


def _take(tensors: Mapping[str, Tensor], key: str, source: Path) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"{source}: has no tensor '{key}'; {_REMEDY}")
    return tensors[key]
