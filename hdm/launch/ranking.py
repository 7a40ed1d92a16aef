"""What the arms of a sweep came to, best first: for the terminal, as Markdown, as CSV and as MLflow's table."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hdm.launch.arm import Arm
from hdm.track.events import latest_metrics, read

if TYPE_CHECKING:
    from rich.table import Table

    from hdm.stats import Comparison, NoiseFloor

ONE_SEED = "One seed proves nothing: repeat with seeds=8 before believing an order."
FEW_SEEDS = "± is the standard deviation over seeds, not a confidence interval."
_HIDDEN = ("train/", "speed/", "cost/", "data/", "initial/", "system/", "model/", "val/loss_t", "eval/")
_MOST_VERDICTS = 12
_FIXED = ("samples", "images_per_second", "hours", "parameters", "flops_per_sample")


@dataclass(kw_only=True, slots=True)
class Row:
    """One arm: how it ended and what it measured."""

    arm: Arm
    status: str
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None

    @classmethod
    def of(cls, arm: Arm, status: str, reason: str = "", *, parameters: int | None = None) -> "Row":
        """The row of `arm`, with the numbers that its run folder holds."""
        metrics = latest_metrics(read(arm.folder))
        if arm.outcome is not None:
            metrics |= arm.outcome.metrics
        return cls(arm=arm, status=status, reason=reason, metrics=metrics, parameters=parameters)

    def fixed(self) -> dict[str, float]:
        """Costs: samples seen, images per second of training, hours of training, parameters, training FLOPs per sample."""
        seconds, flops = self.metrics.get("cost/seconds", math.nan), self.metrics.get("cost/flops", math.nan)
        points = [e.data["samples"] for e in read(self.arm.folder) if e.type == "metrics" and e.data["samples"] is not None]
        samples = float(max(points, default=0))
        return {
            "samples": samples,
            "images_per_second": samples / seconds if seconds else math.nan,
            "hours": seconds / 3600,
            "parameters": float(self.parameters) if self.parameters else math.nan,
            "flops_per_sample": flops / samples if samples else math.nan,
        }


class Ranking:
    """Arms grouped by setting (all but the seed) and sorted by the mean of the primary metric over the finished seeds."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        metric: str,
        direction: str = "minimize",
        baseline: str | None = None,
        alpha: float = 0.05,
        noise: "NoiseFloor | None" = None,
    ) -> None:
        self.rows, self.metric, self.alpha, self.noise = list(rows), metric, alpha, noise
        self.baseline = baseline or next((row.arm.setting for row in rows), "")
        self.minimize = direction == "minimize"
        self._sign = 1.0 if self.minimize else -1.0
        settings: dict[str, list[Row]] = {}
        for row in rows:
            settings.setdefault(row.arm.setting, []).append(row)
        self.settings = dict(sorted(settings.items(), key=lambda item: self._order(item[1])))
        self.seeds = max((len(group) for group in settings.values()), default=0)

    def value(self, row: Row) -> float | None:
        """The primary metric of a finished arm."""
        return row.metrics.get(self.metric) if row.status == "finished" else None

    def others(self) -> list[str]:
        """Other metrics worth a column, in the order in which they were measured."""
        seen = dict.fromkeys(key for row in self.rows if row.status == "finished" for key in row.metrics)
        return [key for key in seen if key != self.metric and not key.startswith(_HIDDEN)]

    def summary(self) -> dict[str, float]:
        """What the sweep's own run reports: the mean of each setting, the best, and how many arms ended how."""
        means = {name: mean for name, group in self.settings.items() if (mean := self._mean(group, self.metric)) is not None}
        counts = {f"sweep/{status}": float(sum(r.status == status for r in self.rows)) for status in ("finished", "failed")}
        best = {"sweep/best": min(means.values(), key=lambda v: self._sign * v)} if means else {}
        return {f"sweep/{name}": mean for name, mean in means.items()} | best | counts

    def headline(self) -> str:
        """The sentence that belongs under the table."""
        if self.seeds < 2:
            return ONE_SEED
        verdicts = [f"{c.name} against {self.baseline}: {c.words}." for c in self.comparisons()[:_MOST_VERDICTS] if c.differences]
        return " ".join([FEW_SEEDS, *self._noise(), *verdicts])

    def comparisons(self) -> "list[Comparison]":
        """Each setting against the baseline (by default the first), over common seeds: see `hdm.stats.compare`."""
        from hdm.stats import compare

        groups: dict[str, dict[int, float]] = {}
        for row in self.rows:
            values = groups.setdefault(row.arm.setting, {})
            if (value := self.value(row)) is not None:
                values[row.arm.run.seed] = value
        others = {name: values for name, values in groups.items() if name != self.baseline}
        base = groups.get(self.baseline, {})
        return compare(base, others, minimize=self.minimize, alpha=self.alpha, noise=self.noise)

    def band(self) -> float:
        """Half the width of the noise band of a difference between two settings; 0 without an A/A sweep."""
        return self.noise.band(self.seeds, confidence=1 - self.alpha) if self.noise else 0.0

    def ranks(self) -> dict[str, int]:
        """1 + the number of settings whose mean is ahead by more than the noise band, of the settings that have a mean."""
        means = {
            name: self._sign * mean for name, group in self.settings.items() if (mean := self._mean(group, self.metric)) is not None
        }
        band = self.band()
        return {name: 1 + sum(other < mean - band for other in means.values()) for name, mean in means.items()}

    def leader(self) -> str | None:
        """The setting to go on with: the one with the best mean, or the baseline where the difference is inside the noise band."""
        ranks = self.ranks()
        if not ranks:
            return None
        best = next(name for name in self.settings if name in ranks)
        return self.baseline if self.noise and ranks.get(self.baseline) == 1 else best

    def missing(self) -> str:
        """Why no arm has the primary metric, or ""."""
        finished = [row for row in self.rows if row.status == "finished"]
        if not finished or any(self.value(row) is not None for row in finished):
            return ""
        return f"metric={self.metric}: no arm measured it; they measured {', '.join(sorted(finished[0].metrics))}"

    # --- forms

    def table(self) -> "Table":
        """For the terminal."""
        from rich.table import Table

        columns, lines = self._cells()
        table = Table(title=None, caption=self.headline(), caption_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in ("setting", "status") else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """For people who read files."""
        columns, lines = self._cells()
        rows = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines)]
        failures = [f"- {row.arm.label}: {row.reason}" for row in self.rows if row.status == "failed"]
        return "\n".join([*rows, "", self.headline(), *(["", "Failed:", "", *failures] if failures else []), ""])

    def write(self, folder: Path) -> list[Path]:
        """table.md (settings), table.csv (every arm) and table.json (settings, as MLflow shows tables) in `folder`."""
        paths = [folder / f"table.{suffix}" for suffix in ("md", "csv", "json")]
        paths[0].write_text(self.markdown(), encoding="utf-8")
        with open(paths[1], "w", encoding="utf-8", newline="") as file:
            self._write_csv(file)
        columns, lines = self._cells()
        paths[2].write_text(json.dumps({"columns": columns, "data": lines}), encoding="utf-8")
        return paths

    def _write_csv(self, file: "object") -> None:
        keys = list(self.rows[0].arm.point)
        measured = list(dict.fromkeys(key for row in self.rows for key in row.metrics))
        writer = csv.writer(file)  # type: ignore[arg-type]
        writer.writerow([*keys, "status", "reason", "folder", *_FIXED, *measured])
        for group in self.settings.values():
            for row in group:
                costs = row.fixed()
                numbers = [costs[key] for key in _FIXED] + [row.metrics.get(key, math.nan) for key in measured]
                texts = ["" if math.isnan(v) else repr(v) for v in numbers]
                writer.writerow([*row.arm.point.values(), row.status, row.reason, row.arm.folder, *texts])

    def _noise(self) -> list[str]:
        if self.noise is None:
            return []
        what = "arms that do not differ" if self.noise.paired else "two sets of seeds of one arm"
        return [f"Differences of means within ± {self.band():.2g} are noise, as between {what}, and share a rank."]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        others = self.others()
        columns = ["rank", "setting", self.metric, *others, "parameters", "FLOPs/sample", "images/s", "hours", "status"]
        lines, ranks = [], self.ranks()
        for name, group in self.settings.items():
            costs = [row.fixed() for row in group if row.status == "finished"]
            mean = {key: statistics.fmean(values) if (values := [c[key] for c in costs]) else math.nan for key in _FIXED}
            lines.append([
                str(ranks.get(name, "-")),
                name,
                *(self._spread(group, key) for key in (self.metric, *others)),
                _short(mean["parameters"]), _short(mean["flops_per_sample"]), _short(mean["images_per_second"]),
                "" if math.isnan(mean["hours"]) else f"{mean['hours']:.3f}",
                _status(group),
            ])  # fmt: skip
        return columns, lines

    def _values(self, group: Sequence[Row], key: str) -> list[float]:
        return [v for row in group if row.status == "finished" and math.isfinite(v := row.metrics.get(key, math.nan))]

    def _mean(self, group: Sequence[Row], key: str) -> float | None:
        values = self._values(group, key)
        return statistics.fmean(values) if values else None

    def _spread(self, group: Sequence[Row], key: str) -> str:
        values = self._values(group, key)
        if not values:
            return ""
        mean = f"{statistics.fmean(values):.5g}"
        return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean

    def _order(self, group: Sequence[Row]) -> tuple[bool, float]:
        mean = self._mean(group, self.metric)
        return (mean is None, self._sign * mean if mean is not None else 0.0)


def count_parameters(arms: Sequence[Arm]) -> Mapping[str, int]:
    """Trainable parameters of every arm's network by label, counted on the meta device once for each setting."""
    from hdm.model import Architecture, build

    counts: dict[str, int] = {}
    for arm in arms:
        if arm.setting not in counts:
            counts[arm.setting] = sum(p.numel() for p in build(Architecture.of(arm.run), seed=None).parameters())
    return {arm.label: counts[arm.setting] for arm in arms}


def _status(group: Sequence[Row]) -> str:
    counts: dict[str, int] = {}
    for row in group:
        counts[row.status] = counts.get(row.status, 0) + 1
    if len(group) == 1:
        return group[0].status
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _short(value: float) -> str:
    if math.isnan(value):
        return ""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
