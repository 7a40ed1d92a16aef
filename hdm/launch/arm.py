"""The arms of a sweep: one run each, composed and checked before anything starts, and executed in a process of its own."""

import hashlib
import itertools
import os
import re
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.axes import AXES
from hdm.config.compose import DEFAULT_EXPERIMENT, compose
from hdm.config.errors import ConfigError, HdmError
from hdm.config.explain import field_types
from hdm.config.identity import run_name
from hdm.config.lines import quote
from hdm.config.schema import Resume, RunConfig
from hdm.config.traits import declared
from hdm.files import locked
from hdm.model.match import matched
from hdm.track.events import EventLog, read

if TYPE_CHECKING:
    from hdm.run import Outcome


@dataclass(kw_only=True, slots=True)
class Arm:
    """One point of the grid. `point` holds what differs between arms, `overrides` the whole command line."""

    point: dict[str, str]
    overrides: list[str]
    run: RunConfig
    folder: Path

    @property
    def outcome(self) -> "Outcome | None":
        """What the arm came to; None when it is not finished."""
        from hdm.run import finished

        return finished(self.folder)

    @property
    def label(self) -> str:
        """What distinguishes the arm: `merge=cross seed=1`."""
        return _label(self.point)

    @property
    def setting(self) -> str:
        """The label without the seed: arms that differ in nothing else are repetitions of one setting."""
        return _label({key: value for key, value in self.point.items() if key != "seed"})


def compose_arms(fixed: Sequence[str], swept: Mapping[str, Sequence[str]]) -> list[Arm]:
    """Every combination of the swept values, checked. Raises ConfigError, naming the arm, for the first that cannot run."""
    arms: dict[Path, Arm] = {}
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values))
        overrides = [
            *(text for text in fixed if _applies(text, point, swept, fixed)),
            *(f"{key}={value}" for key, value in point.items()),
        ]
        try:
            run = matched(compose(overrides, default_experiment=DEFAULT_EXPERIMENT))
        except ConfigError as error:
            raise ConfigError(f"arm {_label(point)}: {error}") from None
        if run.resume is not Resume.auto:
            raise ConfigError("resume=never: a sweep continues its arms; leave resume=auto and change seed= or name= for new ones")
        arm = Arm(point=point, overrides=overrides, run=run, folder=Path(run.out) / run_name(run))
        if arm.folder in arms:
            twin = arms[arm.folder]
            if {key for key in point if point[key] != twin.point[key]} == {"match"}:
                continue  # match=none,params: there is nothing to match about one of the settings
            raise ConfigError(
                f"arms {twin.label} and {arm.label} compute the same thing ({arm.folder}); sweep a key that influences the result"
            )
        arms[arm.folder] = arm
    return list(arms.values())


def _applies(text: str, point: Mapping[str, str], swept: Mapping[str, Sequence[str]], fixed: Sequence[str]) -> bool:
    """Whether the arm at `point` has the field that `text` sets: routing=tread,none routing.rate=0.5 is about tread alone.

    So is backbone=xut,dit routing.rate=0.5, where dit implies routing=none.
    """
    group, _, field = text.partition("=")[0].partition(".")
    if group not in AXES or not field:
        return True
    if group in swept:
        values, value = swept[group], point[group]
    elif "backbone" in swept and not any(other.startswith(f"{group}=") for other in fixed):
        values = [_implied(backbone, group) for backbone in swept["backbone"]]
        value = _implied(point["backbone"], group)
    else:
        return True
    variants = AXES[group].variants
    owners = [v for v in values if v in variants and field in field_types(variants[v].config)]
    return not owners or value in owners


def _implied(backbone: str, group: str) -> str:
    """The variant of `group` that a backbone brings along."""
    known = AXES["backbone"].variants.get(backbone)
    return (declared(known.config, "implies") if known else {}).get(group, AXES[group].default)


def sweep_name(arms: Sequence[Arm]) -> str:
    """The name of the sweep, the same for the same set of arms in any order: `merge-1f0c77ab`."""
    digest = hashlib.blake2b("\n".join(sorted(str(arm.folder.name) for arm in arms)).encode(), digest_size=4).hexdigest()
    keys = re.sub(r"[^\w.-]", "_", "-".join(arms[0].point))
    return f"{keys[:60]}-{digest}"


def adopted(arm: Arm, sweep: str) -> list[str]:
    """The arm's command line as part of `sweep`: MLflow shows it under the sweep's run, by what distinguishes it."""
    return [*arm.overrides, f"track.parent={quote(f'sweeps/{sweep}')}", f"track.name={quote(arm.run.track.name or arm.label)}"]


def sweep_tag(sweep: str) -> str:
    """The tag that marks the runs of a sweep; a run may be an arm of several."""
    return f"hdm.sweep.{sweep}"


def mark(folder: Path, sweep: str) -> None:
    """Tag the run in `folder` as an arm of `sweep`, once."""
    tag = sweep_tag(sweep)
    if not any(event.type == "tags" and tag in event.data["values"] for event in read(folder)):
        log = EventLog(folder)
        log.tags({tag: "arm"})
        log.close()


def run_arm(overrides: Sequence[str], folder: str, sweep: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Execute one arm; called in a fresh process.

    Returns {"status": "finished" | "interrupted" | "failed", "reason": one line}; what it measured is in the run folder. SIGINT and
    SIGTERM interrupt it: in training it saves first.
    """
    os.environ.update(environment)
    os.setsid()  # Ctrl-C in the launcher's terminal goes to the launcher, which tells the arms
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    from hdm.run import execute

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        wait_for(Path(folder))
        mark(Path(folder), sweep)
        outcome = execute(matched(compose(overrides, default_experiment=DEFAULT_EXPERIMENT)))
    except KeyboardInterrupt:
        return {"status": "interrupted", "reason": ""}
    except HdmError as error:
        print(f"error: {error}", flush=True)
        return {"status": "failed", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {"status": outcome.status, "reason": ""}


def wait_for(folder: Path) -> None:
    """Return when no process works in the run folder: a launcher that was killed leaves its arms running."""
    with locked(folder / "lock"):
        pass


def _label(point: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in point.items()) or "baseline"


def sort_keys(swept: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The swept keys in the order of the axes, the seed last, so that repetitions of a setting run one after the other."""
    order = list(AXES)
    rank = {key: (key == "seed", order.index(key) if key in order else len(order)) for key in swept}
    return {key: list(swept[key]) for key in sorted(swept, key=lambda key: rank[key])}
