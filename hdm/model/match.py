"""`match=params|flops`: sizes under which a network has as many parameters, or FLOPs, as XUT of the report.

The reference is XUT with every axis at its default, at the run's own `model.` sizes, patch, text width and latent channels. FLOPs
are those of one unrouted forward pass at the run's crop (of the first stage, if there are stages) with the longest text: the rate
of routing is a choice of training, and says nothing about the network.

First the number of blocks, if the backbone has a field `blocks` that is null: the one that comes nearest. Then `model.mlp_dim`, in
multiples of 8, or of 1 where these are too coarse. Both counts grow with either, so each is found by bisection.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hdm.config.compat import chosen, key
from hdm.config.errors import ConfigError
from hdm.config.schema import Match, RunConfig

if TYPE_CHECKING:
    from hdm.model.backbone import Architecture

TOLERANCE = 0.01
_WIDEST = 64  # times the MLP, and as many times the blocks, that the run starts from


@dataclass(frozen=True, slots=True)
class Cost:
    """What is to be equal: a count of a network that is never built; `known` holds what was counted before."""

    of: Match
    grid: tuple[int, int]
    text_tokens: int
    known: dict[str, int] = field(default_factory=dict)

    @classmethod
    def wanted(cls, run: RunConfig) -> "Cost":
        """What `run.match` asks for, at the run's shapes."""
        from hdm.config.compose import stage_run

        first = stage_run(run, run.stages[0]) if run.stages else run
        side = first.crop.size // (run.autoencoder.factor * run.model.patch)
        return cls(run.match, (side, side), first.text_encoder.max_length)

    def __call__(self, run: RunConfig) -> int:
        """Of the network of `run`."""
        from hdm.model import Architecture

        return self.count(Architecture.of(run))

    def count(self, architecture: "Architecture") -> int:
        """Of the network of `architecture`."""
        name = repr(architecture)
        if name not in self.known:
            self.known[name] = self._counted(architecture)
        return self.known[name]

    def _counted(self, architecture: "Architecture") -> int:
        from hdm.model import build
        from hdm.model.flops import count_flops

        if self.of is Match.flops:
            return count_flops(architecture, grid=self.grid, text_tokens=self.text_tokens)
        return sum(p.numel() for p in build(architecture, seed=None).parameters())

    @property
    def words(self) -> str:
        """In words."""
        return "parameters" if self.of is Match.params else "FLOPs a forward pass"


def matched(run: RunConfig) -> RunConfig:
    """`run` with the sizes that `match` asks for, `match=none` and a note in `matched`. Raises ConfigError where none do."""
    if run.match is Match.none:
        return run
    from hdm.model import Architecture

    cost, own = Cost.wanted(run), Architecture.of(run)
    target = cost.count(Architecture(size=own.size, in_channels=own.in_channels, context_dim=own.context_dim))
    before = cost(run)
    result = run
    if before != target:
        if getattr(run.backbone, "blocks", 0) is None:
            result = _blocks(result, cost, target)
        result = _mlp_dim(result, cost, target)
    after = cost(result)
    if abs(after / target - 1) > TOLERANCE:
        raise ConfigError(
            f"match={run.match.name}: {key(chosen(run)['backbone'])} cannot come within 1 % of the {target:,} {cost.words} of XUT;"
            f" the nearest has {after:,} ({after / target - 1:+.1%}) with {_changes(run, result) or 'its sizes as they are'};"
            " use match=none, or change model.depth or another axis"
        )
    note = (
        f"{cost.words} matched to XUT's {target:,}: {_changes(run, result) or 'nothing to change'};"
        f" {before:,} -> {after:,} ({after / target - 1:+.2%})"
    )
    return dataclasses.replace(result, match=Match.none, matched=note)


def _changes(before: RunConfig, after: RunConfig) -> str:
    sizes = {"backbone.blocks": after.backbone, "model.mlp_dim": after.model}
    old = {"backbone.blocks": before.backbone, "model.mlp_dim": before.model}
    pairs = ((name, getattr(old[name], field := name.split(".")[1], None), getattr(sizes[name], field, None)) for name in sizes)
    return ", ".join(f"{name}={new}" + (f" (was {was})" if was is not None else "") for name, was, new in pairs if was != new)


def _blocks(run: RunConfig, cost: Cost, target: int) -> RunConfig:
    """`run` with the number of blocks that comes nearest."""

    def having(blocks: int) -> RunConfig:
        return dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, blocks=blocks))

    return _nearest(having, cost, target, start=run.model.blocks, step=1) or run


def _mlp_dim(run: RunConfig, cost: Cost, target: int) -> RunConfig:
    """`run` with the MLP that comes nearest, its own if none comes nearer."""

    def having(mlp_dim: int) -> RunConfig:
        return dataclasses.replace(run, model=dataclasses.replace(run.model, mlp_dim=mlp_dim))

    best = run
    for step in (8, 1):
        found = _nearest(having, cost, target, start=run.model.mlp_dim, step=step)
        best = min((r for r in (best, found) if r is not None), key=lambda r: _distance(r, cost, target))
        if _distance(best, cost, target) <= TOLERANCE:
            break
    return best


def _distance(run: RunConfig, cost: Cost, target: int) -> float:
    return abs(cost(run) / target - 1)


def _nearest(having: Callable[[int], RunConfig], cost: Cost, target: int, *, start: int, step: int) -> RunConfig | None:
    """Of the sizes that are multiples of `step` and pass their checks, the one nearest to `target`; None if none passes.

    Interpolation between a size that is too small and one that is too large, in units of `step`; a size that is refused gives way
    to the next smaller one.
    """
    known: dict[int, int] = {}

    def usable(unit: int, least: int) -> int | None:
        """The largest unit from `unit` down to `least` that the variants accept."""
        return next((u for u in range(unit, least - 1, -1) if _accepted(having(u * step))), None)

    def at(unit: int) -> int:
        if unit not in known:
            known[unit] = cost(having(unit * step))
        return known[unit]

    low = next((u for u in range(1, 65) if _accepted(having(u * step))), None)
    if low is None:
        return None
    high = usable(max(start // step, low), low) or low
    while at(high) < target and high < _WIDEST * max(start // step, 1):
        low, high = high, usable(2 * high, high + 1) or high
        if low == high:
            break
    while at(low) < target < at(high) and high - low > 1:
        guess = low + round((high - low) * (target - at(low)) / (at(high) - at(low)))
        middle = usable(min(max(guess, low + 1), high - 1), low + 1)
        if middle is None:
            middle = next((u for u in range(low + 1, high) if _accepted(having(u * step))), None)
        if middle is None:
            break
        low, high = (middle, high) if at(middle) <= target else (low, middle)
        neighbour = usable(low + 1, low + 1) if at(low) <= target else None  # an affine cost is met at once: look next door
        if neighbour is not None and neighbour < high and at(neighbour) >= target:
            high = neighbour
    nearest = min(known, key=lambda unit: (abs(known[unit] - target), unit))
    return having(nearest * step)


def _accepted(run: RunConfig) -> bool:
    """Whether the backbone and the MLP take these sizes."""
    configs: list[Any] = [run.backbone, run.mlp]
    try:
        for config in configs:
            if hasattr(config, "check"):
                config.check(run)
    except ConfigError:
        return False
    return True
