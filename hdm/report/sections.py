"""The tables of a report."""

import math
from collections.abc import Sequence

from hdm.report import words
from hdm.report.analysis import COSTS, Analysis, Setting, common, varying
from hdm.report.numbers import NOTHING, Digits, duration, p_value, short
from hdm.report.tables import Table
from hdm.stats import Interval, Verdict

_MARKS = {Verdict.better: "better", Verdict.worse: "worse"}


def results(analysis: Analysis) -> Table:
    """The comparison: one row per setting, best first."""
    write, alpha = words.digits(analysis), analysis.record.alpha
    level = f"{100 * (1 - alpha):g} % CI"
    with_bca = any(len(c.seeds) >= 8 for c in analysis.comparisons.values())
    several = sum(bool(c.differences) for c in analysis.comparisons.values()) > 1
    columns = ["setting", "seeds", analysis.metric, "difference", level]
    columns += [f"{level} (BCa)"] if with_bca else []
    columns += ["p", *(["p (Holm)"] if several else []), "verdict"]
    rows, marks = [], {}
    for number, setting in enumerate(analysis.settings):
        values = setting.finite(analysis.metric)
        row = [setting.label, str(len(values)), write.spread(setting.mean(analysis.metric), setting.spread(analysis.metric))]
        c = analysis.comparisons.get(setting.label)
        if c is None:
            marks[number] = "base"
            row += [NOTHING] * (len(columns) - len(row) - 1) + ["baseline"]
        else:
            tested = len(c.seeds) > 1
            row += [write.text(c.mean, sign=True), _interval(write, c.interval)]
            row += [_interval(write, c.bca)] if with_bca else []
            row += [p_value(c.p) if tested else NOTHING]
            row += [p_value(c.adjusted_p) if tested else NOTHING] if several else []
            row += [c.words]
            marks[number] = _MARKS.get(c.verdict, "open")
        rows.append(row)
    caption = f"{analysis.record.name}. {words.budget(analysis)} {words.method(analysis)} {words.noise(analysis)}"
    return Table(
        name="results", title="Results", columns=columns, rows=rows, caption=caption, text=(0, len(columns) - 1), marks=marks
    )


def every_seed(analysis: Analysis) -> Table:
    """The metric of every arm, with the state of those that have none."""
    write, seeds = words.digits(analysis), analysis.seeds
    rows = []
    for setting in analysis.settings:
        by_seed = {arm.seed: arm for arm in setting.arms}
        row = [setting.label]
        for seed in seeds:
            arm = by_seed.get(seed)
            if arm is None:
                row.append(NOTHING)
            elif not arm.finished:
                row.append(arm.status)
            elif analysis.metric not in arm.metrics:
                row.append("not measured")
            else:
                value = arm.metrics[analysis.metric]
                row.append("not finite" if not math.isfinite(value) else write.text(value))
        rows.append(row)
    caption = f"{analysis.metric} of every arm, one column per seed."
    return Table(name="seeds", title="Every seed", columns=["setting", *(f"seed {s}" for s in seeds)], rows=rows, caption=caption)


def other_metrics(analysis: Analysis) -> Table | None:
    """Means of what else was measured. Described, not tested: one metric was declared before the start."""
    if not analysis.others:
        return None
    measured = [s for s in analysis.settings if any(s.finite(key) for key in analysis.others)]
    columns = {key: Digits.of([s.mean(key) for s in measured], [s.spread(key) for s in measured]) for key in analysis.others}
    rows = [[s.label, *(write.spread(s.mean(key), s.spread(key)) for key, write in columns.items())] for s in measured]
    caption = "Mean ± standard deviation over seeds. Only the metric that was declared is tested; these describe."
    return Table(name="metrics", title="Other metrics", columns=["setting", *columns], rows=rows, caption=caption)


def cost(analysis: Analysis) -> Table | None:
    """What each setting cost, and the sum over all arms."""
    known = [(key, name) for key, name in COSTS if any(s.finite(key) for s in analysis.settings)]
    if not known:
        return None
    rows = [[s.label, str(len(s.arms)), *(_cost(key, s.mean(key)) for key, _ in known)] for s in analysis.settings]
    sums = {"cost/flops", "cost/seconds", "cost/dollars"}
    total = ["all arms", str(len(analysis.record.arms))]
    for key, _ in known:
        values = [v for arm in analysis.record.arms if math.isfinite(v := arm.metrics.get(key, math.nan))]
        total.append(f"{_cost(key, math.fsum(values))} in all" if key in sums and values else "")
    caption = "Means over finished seeds; the last row sums over all arms, unfinished ones too. Memory is the last reading."
    columns = ["setting", "arms", *(name for _, name in known)]
    return Table(name="cost", title="Cost", columns=columns, rows=[*rows, total], caption=caption, marks={len(rows): "total"})


def importance(analysis: Analysis) -> Table | None:
    """Which axes of a wide search matter."""
    if not analysis.importance:
        return None
    rows = [[axis, f"{100 * share:.0f} %"] for axis, share in analysis.importance.items()]
    caption = f"Share of the variance of {analysis.metric} between settings that each axis explains ({analysis.importance_method})."
    return Table(name="importance", title="Which axes matter", columns=["axis", "share"], rows=rows, caption=caption)


def configuration(analysis: Analysis) -> Table | None:
    """What differs between settings, besides the seed."""
    keys = [key for key in varying(analysis.record.arms) if key != "matched"]
    if not keys:
        return None
    rows = [[s.label, *(_value(s, key) for key in keys)] for s in analysis.settings]
    caption = "Every parameter that is not the same in all arms. A dash: the setting has no such parameter."
    return Table(
        name="differences", title="What differed", columns=["setting", *keys], rows=rows, caption=caption, text=range(len(keys) + 1)
    )


def shared(analysis: Analysis) -> Table:
    """What all arms have in common."""
    rows = [[key, value] for key, value in common(analysis.record.arms).items() if not key.startswith("track.")]
    return Table(name="common", title="What all arms share", columns=["parameter", "value"], rows=rows, text=(0, 1))


def _value(setting: Setting, key: str) -> str:
    values = dict.fromkeys(arm.params[key] for arm in setting.arms if key in arm.params)
    return " / ".join(values) if values else NOTHING


def _cost(key: str, value: float) -> str:
    return duration(value) if key == "cost/seconds" else short(value)


def _interval(write: Digits, interval: Interval | None) -> str:
    if interval is None:
        return NOTHING
    return f"[{write.text(interval.low, sign=True)}, {write.text(interval.high, sign=True)}]"


def tables(analysis: Analysis) -> Sequence[Table]:
    """All that there are, in the order of the page."""
    found = [
        results(analysis),
        every_seed(analysis),
        other_metrics(analysis),
        cost(analysis),
        importance(analysis),
        configuration(analysis),
    ]
    return [table for table in found if table is not None]
