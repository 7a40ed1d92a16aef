"""What a sweep came to: settings in order, comparisons, noise floor, costs, what differed. Numbers only; words are in `words`."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hdm.config.errors import HdmError
from hdm.report.protocol import Reader, differences
from hdm.report.record import ArmRecord, SweepRecord
from hdm.stats import Comparison, NoiseFloor, axis_importance, compare, pareto_front

# (metric, name, short unit): what a setting costs; less is better
COSTS = (
    ("model/parameters", "parameters"),
    ("cost/flops", "training FLOPs"),
    ("cost/seconds", "training time"),
    ("system/process_memory_megabytes", "memory (MB)"),
    ("system/gpu_0_memory_usage_megabytes", "GPU memory (MB)"),
    ("cost/dollars", "dollars"),
)
_NOT_RESULTS = ("train/", "speed/", "cost/", "data/", "initial/", "system/", "model/", "sweep/", "val/loss_t")
# Parameters that say where and how a run was made, not what it computes; and `matched`, which tells what match= did.
_NEUTRAL = ("track.", "out", "name", "datasets", "cache", "device", "resume", "plugins", "hardware.", "experiment", "seed")
_WIDE = 8  # settings from which the importance of axes is worth a table


@dataclass(kw_only=True, slots=True)
class Setting:
    """The arms that differ in nothing but the seed."""

    label: str
    arms: list[ArmRecord]

    def values(self, metric: str) -> dict[int, float]:
        """The metric of the finished arms by seed, NaN and infinity included."""
        return {arm.seed: arm.metrics[metric] for arm in self.arms if arm.finished and metric in arm.metrics}

    def finite(self, metric: str) -> dict[int, float]:
        """Those that are numbers."""
        return {seed: value for seed, value in self.values(metric).items() if math.isfinite(value)}

    def mean(self, metric: str) -> float:
        """Over seeds; NaN without any."""
        values = self.finite(metric)
        return statistics.fmean(values.values()) if values else math.nan

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds; NaN for fewer than two."""
        values = self.finite(metric)
        return statistics.stdev(values.values()) if len(values) > 1 else math.nan


@dataclass(kw_only=True, slots=True)
class Analysis:
    """Everything that the page says, before it is said. `settings` are ordered by the mean of the metric, best first."""

    record: SweepRecord
    metric: str
    minimize: bool
    settings: list[Setting]
    baseline: Setting
    comparisons: dict[str, Comparison]
    noise: NoiseFloor | None
    noise_name: str
    others: list[str]
    importance: dict[str, float]
    importance_method: str
    notes: list[str] = field(default_factory=list)

    @property
    def tested(self) -> bool:
        """Whether there is anything to compare the baseline with."""
        return bool(self.comparisons)

    @property
    def seeds(self) -> list[int]:
        """Every seed of any arm."""
        return sorted({arm.seed for arm in self.record.arms})

    def shown(self, limit: int) -> list[Setting]:
        """The settings for a figure with room for `limit`: the baseline and the best of the others that have a value."""
        others = [s for s in self.settings if s is not self.baseline and not math.isnan(s.mean(self.metric))]
        kept = others[: limit - 1]
        return [self.baseline, *kept]

    def front(self, cost: str) -> list[Setting]:
        """The settings that no other one beats in the metric and in `cost`."""
        sign = 1.0 if self.minimize else -1.0
        front = pareto_front([(sign * s.mean(self.metric), s.mean(cost)) for s in self.settings])
        return [setting for setting, best in zip(self.settings, front) if best]

    def costs(self) -> list[tuple[str, str]]:
        """The costs that every setting with a value was measured for: (metric, name)."""
        valued = [s for s in self.settings if s.finite(self.metric)]
        return [(key, name) for key, name in COSTS if valued and all(s.finite(key) for s in valued)]


def analyse(
    record: SweepRecord,
    read: Reader,
    *,
    baseline: str | None = None,
    metric: str | None = None,
    direction: str | None = None,
    noise: SweepRecord | None = None,
) -> Analysis:
    """Raises HdmError where the numbers of the metric were made under different protocols, naming the fields."""
    name = metric or record.metric
    minimize = (direction or (record.direction if name == record.metric else _direction(name))) == "minimize"
    reference = record.reference(baseline)
    settings = [Setting(label=label, arms=arms) for label, arms in record.settings.items()]
    _require_one_protocol(name, [*record.arms, *(noise.arms if noise else [])], read)
    by_label = {setting.label: setting for setting in settings}
    base = by_label[reference]
    floor = _noise_floor(noise, name)
    others, notes = _other_metrics(record.arms, name, read)
    comparisons = compare(
        base.values(name),
        {s.label: s.values(name) for s in settings if s is not base},
        minimize=minimize,
        alpha=record.alpha,
        noise=floor,
    )
    settings.sort(key=lambda s: _rank(s.mean(name), minimize))
    measured = [s for s in settings if s.finite(name)]
    importance: tuple[dict[str, float], str] = ({}, "")
    if len(measured) >= _WIDE:
        importance = axis_importance([s.arms[0].point for s in measured], [s.mean(name) for s in measured])
    if noise is not None:
        notes += _noise_notes(noise, base, floor)
    return Analysis(
        record=record,
        metric=name,
        minimize=minimize,
        settings=settings,
        baseline=base,
        comparisons={comparison.name: comparison for comparison in comparisons},
        noise=floor,
        noise_name=noise.name if noise else "",
        others=others,
        importance=importance[0],
        importance_method=importance[1],
        notes=[*record.notes, *notes],
    )


def varying(arms: Sequence[ArmRecord]) -> list[str]:
    """The parameters that differ between arms, besides seed, names and places."""
    present = [arm.params for arm in arms if arm.params]
    keys = dict.fromkeys(key for params in present for key in params)
    return [key for key in keys if not key.startswith(_NEUTRAL) and len({params.get(key) for params in present}) > 1]


def common(arms: Sequence[ArmRecord]) -> dict[str, str]:
    """The parameters that all arms share."""
    present = [arm.params for arm in arms if arm.params]
    if not present:
        return {}
    first = present[0]
    return {key: first[key] for key in sorted(first) if all(params.get(key) == first[key] for params in present)}


def _rank(mean: float, minimize: bool) -> tuple[bool, float]:
    return math.isnan(mean), 0.0 if math.isnan(mean) else mean if minimize else -mean


def _direction(metric: str) -> str:
    """Which way is better, of a metric that the sweep was not declared with. Raises HdmError where the name does not tell."""
    words = set(re.split(r"[^a-z]+", metric.lower()))
    if words & {"loss", "fid", "kid", "cmmd", "mmd", "fd", "seconds", "flops", "lpips"}:
        return "minimize"
    if words & {"clip", "alignment", "recall", "precision", "density", "coverage", "accuracy", "ssim", "psnr"}:
        return "maximize"
    raise HdmError(f"metric={metric}: say which way is better, with direction=minimize or direction=maximize")


def _require_one_protocol(metric: str, arms: Sequence[ArmRecord], read: Reader) -> None:
    if found := differences(metric, arms, read):
        more = f" (and {len(found) - 3} more fields)" if len(found) > 3 else ""
        raise HdmError(
            f"metric={metric}: was measured under different protocols, so the arms cannot be compared by it: "
            f"{'; '.join(found[:3])}{more}; evaluate all arms alike, or name another metric="
        )


def _other_metrics(arms: Sequence[ArmRecord], metric: str, read: Reader) -> tuple[list[str], list[str]]:
    """Further results worth a column, and a note for each that mixes protocols and has none for that."""
    seen = dict.fromkeys(key for arm in arms if arm.finished for key in arm.metrics)
    kept, notes = [], []
    for key in seen:
        if key == metric or key.startswith(_NOT_RESULTS):
            continue
        if found := differences(key, arms, read):
            notes.append(f"{key} is left out: it was measured under different protocols ({'; '.join(found[:2])})")
        else:
            kept.append(key)
    return kept, notes


def _noise_floor(noise: SweepRecord | None, metric: str) -> NoiseFloor | None:
    if noise is None:
        return None
    floor = NoiseFloor.of({label: Setting(label=label, arms=arms).finite(metric) for label, arms in noise.settings.items()})
    if floor is None:
        raise HdmError(
            f"noise_floor={noise.name}: it has {metric} for no two arms to compare; run it to its end, or drop noise_floor="
        )
    return floor


def _noise_notes(noise: SweepRecord, base: Setting, floor: NoiseFloor | None) -> list[str]:
    notes = []
    if floor is not None and floor.freedom < 5:
        notes.append(f"the noise floor rests on {floor.freedom} degrees of freedom; the band is wide for that reason")
    if apart := [key for key in varying(noise.arms) if key != "optimizer.eps"]:
        notes.append(f"the settings of the A/A sweep {noise.name} differ in {', '.join(apart[:4])}: is it the same arm twice?")
    ours = next((arm.params for arm in base.arms if arm.params), {})
    for arm in noise.arms[:1]:
        other = {key for key in {*ours, *arm.params} if not key.startswith((*_NEUTRAL, "eval.", "sampling."))}
        differ = sorted(key for key in other if ours.get(key) != arm.params.get(key))
        if ours and differ:
            shown = ", ".join(f"{key}={arm.params.get(key, '')} there, {ours.get(key, '')} here" for key in differ[:4])
            notes.append(
                f"the A/A sweep {noise.name} has another configuration than the baseline ({shown}): its band is a rough guide"
            )
    return notes


def ratio(settings: Sequence[Setting], cost: str) -> float:
    """Largest over smallest mean cost of the settings; 1 where it is not known."""
    means: Mapping[str, float] = {s.label: s.mean(cost) for s in settings}
    known = [mean for mean in means.values() if math.isfinite(mean) and mean > 0]
    return max(known) / min(known) if len(known) > 1 else 1.0
