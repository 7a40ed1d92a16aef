"""A sweep as MLflow knows it: what was asked, and one record for every arm."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hdm.config.errors import HdmError, suggest

FINISHED = "finished"
WORDS = {"RUNNING": "running", "SCHEDULED": "waiting", "FINISHED": FINISHED, "KILLED": "interrupted", "FAILED": "failed"}
ASKED = ("metric", "direction", "arms", "fixed")  # parameters sweep.* of the sweep's run that are no axes


@dataclass(kw_only=True, slots=True)
class ArmRecord:
    """One arm. `point` holds what differs between settings, without the seed; `run_id` is empty where there is no run yet."""

    run: str
    point: dict[str, str]
    setting: str
    seed: int
    run_id: str = ""
    status: str = "not started"
    reason: str = ""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`merge=cross seed=1`."""
        return f"{self.setting} seed={self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its numbers count."""
        return self.status == FINISHED


@dataclass(kw_only=True, slots=True)
class SweepRecord:
    """The sweep: its arms in the order in which they were asked for, and how it is to be judged."""

    name: str
    run_id: str
    arms: list[ArmRecord]
    axes: dict[str, list[str]]
    metric: str = "val/loss"
    direction: str = "minimize"
    baseline: str | None = None
    confirmatory: bool = True
    alpha: float = 0.05
    noise_floor: str | None = None
    sampler: str = "grid"
    pruner: str | None = None
    command: str = ""
    budget: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def minimize(self) -> bool:
        """Whether less of the metric is better."""
        return self.direction == "minimize"

    @property
    def settings(self) -> dict[str, list[ArmRecord]]:
        """The arms of each setting, by label."""
        found: dict[str, list[ArmRecord]] = {}
        for arm in self.arms:
            found.setdefault(arm.setting, []).append(arm)
        return found

    def reference(self, wanted: str | None = None) -> str:
        """The setting that the others are compared with: `wanted`, else the recorded one, else the first. Raises HdmError."""
        label = wanted or self.baseline or next(iter(self.settings), "")
        if label not in self.settings:
            known = ", ".join(list(self.settings)[:12])
            raise HdmError(f"baseline={label}: the sweep has no such setting{suggest(label, self.settings)} (settings: {known})")
        return label


def assemble(name: str, parent: "ArmRecord | None", arms: Iterable[ArmRecord], sheet: Mapping[str, Any] | None) -> SweepRecord:
    """The record of sweep `name` from its own run (`parent`), its arms' runs and its sweep.json (`sheet`).

    Sweeps that were recorded without a sweep.json are put together from parameters and labels. Of two runs of one arm, such as one
    that was deleted and made again, the later counts: `arms` come in the order in which they were started.
    """
    params = parent.params if parent else {}
    runs: dict[str, ArmRecord] = {}
    repeated = 0
    for arm in arms:
        repeated += arm.run in runs
        runs[arm.run] = arm
    notes = [f"{repeated} older runs of the same arms are left out"] if repeated else []
    axes = {key.removeprefix("sweep."): value.split(", ") for key, value in params.items() if key.startswith("sweep.")}
    axes = {key: values for key, values in axes.items() if key not in ASKED}
    record = SweepRecord(name=name, run_id=parent.run_id if parent else "", arms=[], axes=axes, notes=notes)
    record.metric = params.get("sweep.metric", record.metric)
    record.direction = params.get("sweep.direction", record.direction)
    record.command = parent.tags.get("mlflow.source.name", "") if parent else ""
    if sheet is not None:
        _apply(record, sheet, runs)
    else:
        record.arms = _reconstructed(record, runs.values())
    record.axes.pop("seed", None)
    if not record.arms:
        raise HdmError(f"sweep={name}: has no arm in MLflow; did the sweep run, and against this server?")
    return record


def parse_setting(label: str) -> dict[str, str]:
    """{"merge": "cross", "routing.rate": "0.5"} from "merge=cross routing.rate=0.5"; a value may hold spaces."""
    point: dict[str, str] = {}
    key = ""
    for token in label.split(" "):
        name, equals, value = token.partition("=")
        if equals:
            key, point[name] = name, value
        elif key:
            point[key] += f" {token}"
    return point


def _apply(record: SweepRecord, sheet: Mapping[str, Any], runs: Mapping[str, ArmRecord]) -> None:
    """What sweep.json says; an arm without a run is one that did not start."""
    if sheet.get("format") != 1:
        raise HdmError(
            f"sweep={record.name}: its sweep.json has format {sheet.get('format')}, this version reads 1; update hdm-lab"
        )
    record.axes = {key: [str(value) for value in values] for key, values in sheet["axes"].items()}
    record.metric, record.direction = sheet["metric"], sheet["direction"]
    record.baseline, record.noise_floor = sheet.get("baseline"), sheet.get("noise_floor")
    record.confirmatory, record.alpha = bool(sheet.get("confirmatory", True)), float(sheet.get("alpha", 0.05))
    record.sampler, record.pruner = sheet.get("sampler") or "grid", sheet.get("pruner")
    record.budget, record.command = sheet.get("budget") or {}, sheet.get("command", record.command)
    planned = set()
    for entry in sheet["arms"]:
        arm = runs.get(entry["run"]) or ArmRecord(run=entry["run"], point={}, setting="", seed=entry["seed"])
        arm.setting, arm.seed, arm.point = entry["setting"], int(entry["seed"]), parse_setting(entry["setting"])
        planned.add(entry["run"])
        record.arms.append(arm)
    if extra := [run for run in runs if run not in planned]:
        record.notes.append(f"{len(extra)} runs carry the sweep's tag and are not in its sweep.json; they are left out")


def _reconstructed(record: SweepRecord, runs: Iterable[ArmRecord]) -> list[ArmRecord]:
    """Arms of a sweep without sweep.json, by its axes; their order is that of the values on the command line."""
    keys = [key for key in record.axes if key != "seed"]
    arms = []
    for arm in runs:
        named = parse_setting(arm.tags.get("mlflow.runName", ""))
        source = named if all(key in named for key in keys) else arm.params
        arm.point = {key: source.get(key, "") for key in keys}
        arm.setting = " ".join(f"{key}={value}" for key, value in arm.point.items()) or "baseline"
        arm.seed = int(arm.params.get("seed", "0"))
        arms.append(arm)
    orders = {key: {value: number for number, value in enumerate(record.axes[key])} for key in keys}
    return sorted(arms, key=lambda arm: ([(orders[k].get(v, len(orders[k])), v) for k, v in arm.point.items()], arm.seed))
