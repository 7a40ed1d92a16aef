"""The noise band of the A/A sweep that a sweep names, from the folders of its arms."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hdm.launch.record import FILE
from hdm.track.events import latest_metrics, read

if TYPE_CHECKING:
    from hdm.launch.campaign import Sweep
    from hdm.stats import NoiseFloor


def noise_floor(sweep: "Sweep") -> "tuple[NoiseFloor | None, str]":
    """What the A/A sweep of `sweep` measured; without it, why there is none ("" where none was asked for)."""
    from hdm.stats import NoiseFloor

    name = sweep.options.noise_floor
    if not name:
        return None, ""
    out = Path(sweep.run.out)
    values: dict[str, dict[int, float]] = {}
    try:
        arms = json.loads((out / "sweeps" / name / FILE).read_text(encoding="utf-8"))["arms"]
    except (FileNotFoundError, ValueError, KeyError):
        return None, f"noise_floor={name}: no such sweep below {out}, so the verdicts know no noise band; run it, then this again"
    for arm in arms:
        events = read(out / arm["run"])
        ended = [event.data["status"] for event in events if event.type == "status"][-1:]
        if ended == ["finished"]:
            value = latest_metrics(events).get(sweep.options.metric, math.nan)
            values.setdefault(arm["setting"], {})[arm["seed"]] = value
    floor = NoiseFloor.of(values)
    if floor is None:
        return (
            None,
            f"noise_floor={name}: has {sweep.options.metric} for no two arms, so the verdicts know no noise band; finish it",
        )
    return floor, ""
