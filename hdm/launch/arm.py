"""The arms of a sweep: one run each, composed and checked before anything starts."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hdm.config.axes import AXES
from hdm.config.compose import DEFAULT_EXPERIMENT, compose
from hdm.config.errors import ConfigError
from hdm.config.explain import field_types
from hdm.config.identity import run_name
from hdm.config.lines import quote
from hdm.config.schema import Resume, RunConfig
from hdm.config.traits import declared
from hdm.launch.grammar import Point, SweepAxis, points
from hdm.model.match import matched
from hdm.track.events import EventLog, read

if TYPE_CHECKING:
    from hdm.run import Outcome

T = TypeVar("T")


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


def compose_arms(fixed: Sequence[str], axes: Iterable[SweepAxis], *, seeds: Sequence[int] = ()) -> list[Arm]:
    """Every combination of the axes' values, checked. Raises ConfigError, naming the arm, for the first that cannot run."""
    arms: dict[Path, Arm] = {}
    settings = list(points(axes))
    for point in settings:
        for arm in compose_setting(fixed, point, settings, seeds=seeds):
            if arm.folder not in arms:
                arms[arm.folder] = arm
                continue
            twin = arms[arm.folder]
            if {key for key in arm.point if arm.point[key] != twin.point.get(key)} == {"match"}:
                continue  # match=none,params: there is nothing to match about one of the settings
            raise ConfigError(
                f"arms {twin.label} and {arm.label} compute the same thing ({arm.folder}); sweep a key that influences the result"
            )
    return list(arms.values())


def compose_setting(fixed: Sequence[str], point: Point, among: Sequence[Point], *, seeds: Sequence[int] = ()) -> list[Arm]:
    """The arms at `point`, one for every seed, or one with the seed that is set. Fields that only others have fall away."""
    overrides = [text for text in fixed if _applies(text, point, among, fixed)]
    overrides += [f"{key}={value}" for key, value in point.lines.items()]
    label = dict(point.label)
    try:
        run = matched(compose(overrides, default_experiment=DEFAULT_EXPERIMENT))
    except ConfigError as error:
        raise ConfigError(f"arm {_label(label)}: {error}") from None
    if run.resume is not Resume.auto:
        raise ConfigError("resume=never: a sweep continues its arms; leave resume=auto and change seed= or name= for new ones")
    arms = []
    for seed in seeds or [run.seed]:
        own = dataclasses.replace(run, seed=seed)
        more = {"seed": str(seed)} if seeds else {}
        texts = [*overrides, *(f"{key}={value}" for key, value in more.items())]
        arms.append(Arm(point=label | more, overrides=texts, run=own, folder=Path(own.out) / run_name(own)))
    return arms


def _applies(text: str, point: Point, among: Sequence[Point], fixed: Sequence[str]) -> bool:
    """Whether the arm at `point` has the field that `text` sets: routing=tread,none routing.rate=0.5 is about tread alone.

    So is backbone=xut,dit routing.rate=0.5, where dit implies routing=none.
    """
    group, _, field = text.partition("=")[0].partition(".")
    if group not in AXES or not field:
        return True
    chosen = [line.partition("=")[2] for line in fixed if line.startswith(f"{group}=")]

    def variant(other: Point) -> str:
        if group in other.lines:
            return other.lines[group]
        if chosen or "backbone" not in other.lines:
            return chosen[-1] if chosen else ""  # what the experiment says, which is not known here
        return _implied(other.lines["backbone"], group)

    variants, mine = AXES[group].variants, variant(point)
    if not mine or not any(group in other.lines or "backbone" in other.lines for other in among):
        return True
    names = {name or AXES[group].default for other in among if (name := variant(other)) is not None}
    owners = [name for name in names if name in variants and field in field_types(variants[name].config)]
    return not owners or mine in owners


def _implied(backbone: str, group: str) -> str:
    """The variant of `group` that a backbone brings along."""
    known = AXES["backbone"].variants.get(backbone)
    return (declared(known.config, "implies") if known else {}).get(group, AXES[group].default)


def sweep_name(arms: Sequence[Arm], *, keys: Sequence[str] = (), about: Sequence[str] = ()) -> str:
    """The name of a sweep, the same for the same set of arms in any order: `merge-1f0c77ab`; without arms of what it is `about`."""
    content = sorted(arm.folder.name for arm in arms) or about
    digest = hashlib.blake2b("\n".join(content).encode(), digest_size=4).hexdigest()
    words = re.sub(r"[^\w.-]", "_", "-".join(keys or arms[0].point))
    return f"{words[:60]}-{digest}"


def adopted(arm: Arm, sweep: str) -> list[str]:
    """The arm's command line as part of `sweep`: MLflow shows it under the sweep's run, by what distinguishes it."""
    return [*arm.overrides, f"track.parent={quote(f'sweeps/{sweep}')}", f"track.name={quote(arm.run.track.name or arm.label)}"]


def sweep_tag(sweep: str) -> str:
    """The tag that marks the runs of a sweep; a run may be an arm of several."""
    return f"hdm.sweep.{sweep}"


def setting_tag(sweep: str) -> str:
    """The tag that holds an arm's setting in a sweep: what the charts of the sweep average over seeds by."""
    return f"hdm.setting.{sweep}"


def mark(folder: Path, sweep: str, *, setting: str = "") -> None:
    """Tag the run in `folder` as an arm of `sweep`, once."""
    tag = sweep_tag(sweep)
    if not any(event.type == "tags" and tag in event.data["values"] for event in read(folder)):
        log = EventLog(folder)
        log.tags({tag: "arm"} | ({setting_tag(sweep): setting} if setting else {}))
        log.close()


def _label(point: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in point.items()) or "baseline"


def sort_keys(swept: Mapping[str, T]) -> dict[str, T]:
    """The swept keys in the order of the axes, the seed last, so that repetitions of a setting run one after the other."""
    order = list(AXES)
    rank = {key: (key == "seed", order.index(key) if key in order else len(order)) for key in swept}
    return {key: swept[key] for key in sorted(swept, key=lambda key: rank[key])}
