"""The coordinate check of muP: by how much a few steps change what each part of a network puts out, at several widths (spec 10).

In the maximal-update parametrisation a step changes the coordinates of every activation by the same amount at every width (Yang et
al., arXiv 2203.03466, appendix D): log2 of the mean |h_t - h_0| against log2 of the width is flat. A rate that is too large for
wide networks makes it rise, one that starves them makes it fall.

Watched is every part of the network that holds a matrix: what stands before and behind the blocks, each block's stream, and each
block's sublayers, one row for all blocks of a stage. They are found by their place in the network, not by name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hdm import rng
from hdm.config.axes import OBJECTIVE, OPTIMIZER
from hdm.config.schema import RunConfig
from hdm.model import Architecture, Backbone, Condition, build, full_view
from hdm.model.width import at_width
from hdm.train.optimizer import AdamWConfig, RateRule, clipped_step, set_rate

LIMIT = 0.2
# Images, image tokens to a side, text tokens. The law is one of widths that are large against the number of tokens: what a layer
# learns of one token is noise of 1 / sqrt(width) in the others, and 1 / sqrt(tokens) of it concerns the token itself.
_BATCH, _SIDE, _TEXT = 4, 4, 4


@dataclass(kw_only=True, slots=True)
class Coordinates:
    """Of each watched part: mean |h_t - h_0| by step (the first is t = 1) and width, the geometric mean over seeds."""

    widths: list[int]
    changes: dict[str, list[list[float]]]

    def slope(self, name: str) -> float | None:
        """The slope of log2 of the last step's change against log2 of the width; None for a part that does not move at all."""
        last = self.changes[name][-1]
        if not any(last):
            return None
        if not all(0 < change < math.inf for change in last):
            return math.nan
        return float(np.polyfit(np.log2(self.widths), np.log2(last), 1)[0])

    def failing(self) -> list[str]:
        """The parts whose change depends on the width."""
        slopes = {name: self.slope(name) for name in self.changes}
        return [name for name, slope in slopes.items() if slope is not None and not abs(slope) < LIMIT]


def measure(
    run: RunConfig,
    optimizer: object,
    *,
    widths: Sequence[int],
    steps: int = 4,
    seeds: int = 4,
    rate: float = 0.3,
    advance: Callable[[float], None] = lambda _: None,
) -> Coordinates:
    """Train the network of `run` by `optimizer`, an optimizer's config, at each width and seed, on the same data.

    All rates are multiplied by `rate`, as a warm-up does. The law is one of small changes: at the full rate of a tuned run the
    first steps move a narrow network by more than its own activations, and slopes of one seed scatter by 0.3.
    """
    logs: dict[str, list[list[list[float]]]] = {}
    for column, width in enumerate(widths):
        architecture = at_width(Architecture.of(run), width)
        for seed in range(seeds):
            for name, by_step in _changes(run, build(architecture, seed=seed), optimizer, steps, rate).items():
                rows = logs.setdefault(name, [[[] for _ in widths] for _ in range(steps)])
                for row, change in zip(rows, by_step, strict=True):
                    row[column].append(math.log2(change) if change > 0 else -math.inf)
            advance(1)
    changes = {name: [[2 ** float(np.mean(cell)) for cell in row] for row in rows] for name, rows in logs.items()}
    return Coordinates(widths=list(widths), changes=changes)


def control(run: RunConfig, widths: Sequence[int]) -> AdamWConfig:
    """AdamW with one rate for all tensors and widths, that of a d x d matrix at the middle width: it must fail the check."""
    chosen = run.optimizer
    given = {key: getattr(chosen, key) for key in ("betas", "eps", "weight_decay") if hasattr(chosen, key)}
    return AdamWConfig(lr=chosen.lr / math.sqrt(min(widths) * max(widths)), rule=RateRule.constant, **given)


def watched(model: nn.Module) -> dict[str, str]:
    """The modules that are watched, by name, and the row that each belongs to: its name without numbers.

    These are the network's children, every member of a list (a block), and its children. A sequence is watched as a whole.
    """
    found, within = {}, tuple[str, ...]()
    for name, module in model.named_modules():
        path = name.split(".")
        last = max((i for i, part in enumerate(path) if part.isdigit()), default=-1)
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        outer = len(path) - last <= 2 and not name.startswith(within)
        if name and not container and outer and any(p.ndim >= 2 for p in module.parameters()):
            found[name] = ".".join(part for part in path if not part.isdigit())
        if isinstance(module, nn.Sequential):
            within += (f"{name}.",)
    return found


def _changes(run: RunConfig, model: Backbone, optimizer: object, steps: int, rate: float) -> dict[str, list[float]]:
    """mean |h_t - h_0| by row and step t = 1 … steps."""
    rows = watched(model)
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen.setdefault(name, []).extend(leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in rows]
    objective, update, inputs = OBJECTIVE.build(run.objective), OPTIMIZER.build(optimizer, model), _inputs(model)
    set_rate(update, rate)
    first: dict[str, list[Tensor]] = {}
    changes: dict[str, list[float]] = {row: [] for row in rows.values()}
    for step in range(steps + 1):
        seen.clear()
        losses = objective.loss(model, **inputs, route=None)
        if step == 0:
            first = dict(seen)
        else:
            for row, by_step in changes.items():
                parts = [name for name in first if rows[name] == row]
                by_step.append(float(np.mean([_distance(seen[name], first[name]) for name in parts])) if parts else 0.0)
        if step < steps:
            losses.mean().backward()
            clipped_step(update, 0.0)
    for handle in handles:
        handle.remove()
    return {row: by_step for row, by_step in changes.items() if any(rows[name] == row for name in first)}  # what forward() calls


def _distance(now: list[Tensor], then: list[Tensor]) -> float:
    """The mean over all elements of |now - then|."""
    total = sum(float((a - b).abs().sum(dtype=torch.float64)) for a, b in zip(now, then, strict=True))
    return total / max(sum(tensor.numel() for tensor in then), 1)


def _inputs(model: Backbone) -> dict[str, Any]:
    """The same images, noise, timesteps and text states for every network."""
    a = model.architecture

    def draw(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, f"coordinates/{name}", range(_BATCH), shape))

    pixels = _SIDE * a.size.patch
    views = full_view(256, 256, _BATCH)
    return {
        "latents": draw("latents", a.in_channels, pixels, pixels),
        "noise": draw("noise", a.in_channels, pixels, pixels),
        "timestep": (torch.arange(_BATCH) + 0.5) / _BATCH,
        "condition": Condition(
            text=draw("text", _TEXT, a.context_dim),
            position=model.position_map(views, (_SIDE, _SIDE)),
            aspect=torch.linspace(-0.5, 0.5, _BATCH),
        ),
    }


def as_dict(result: Coordinates) -> dict[str, Any]:
    """For JSON: also the slopes, and which parts fail."""
    slopes = {name: result.slope(name) for name in result.changes}
    finite = {name: None if slope is None or math.isnan(slope) else slope for name, slope in slopes.items()}
    return {**dataclasses.asdict(result), "slopes": finite, "failing": result.failing()}
