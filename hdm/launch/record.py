"""The sweep as a record, `sweep.json`: what was asked, what runs, how it is to be judged. `hdm.report` reads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.files import write_json
from hdm.launch.grammar import values_of

if TYPE_CHECKING:
    from hdm.launch.campaign import Sweep

FILE = "sweep.json"


def record(sweep: "Sweep") -> dict[str, Any]:
    """The sweep as JSON."""
    options = sweep.options
    return {
        "format": 1,
        "name": sweep.name,
        "command": sweep.command,
        "experiment": sweep.run.track.experiment,
        "axes": values_of(sweep.axes.values()),
        "fixed": sweep.fixed,
        "seeds": sweep.seeds,
        "budget": budget(sweep),
        "metric": options.metric,
        "direction": options.direction.name,
        "baseline": options.baseline,
        "confirmatory": options.confirms,
        "alpha": options.alpha,
        "noise_floor": options.noise_floor,
        "sampler": options.search.name,
        "pruner": None if options.pruner.name == "none" else options.pruner.name,
        "trials": options.trials,
        "cost": options.cost if options.search.name == "nsgaii" else None,
        "arms": [
            {"label": arm.label, "setting": arm.setting, "seed": arm.run.seed, "run": arm.folder.name, "overrides": arm.overrides}
            for arm in sweep.arms
        ],
    }


def budget(sweep: "Sweep") -> dict[str, Any]:
    """The limits that all arms share, and `iso`: what they were given as much of as the baseline."""
    limits = {}
    for key in ("steps", "samples", "flops", "seconds"):
        values = {getattr(arm.run.budget, key) for arm in sweep.arms} or {getattr(sweep.run.budget, key)}
        if len(values) == 1 and (value := values.pop()) is not None:
            limits[key] = value
    return limits | ({"iso": sweep.options.iso.name} if sweep.options.iso else {})


def write(sweep: "Sweep") -> Path:
    """Write the record into the sweep's folder."""
    path = sweep.folder / FILE
    write_json(path, record(sweep))
    return path
