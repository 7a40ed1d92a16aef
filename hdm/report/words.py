"""The sentences of a report: what was claimed, under which budget, how sure it is, and what a reader must know about it."""

import math
from collections.abc import Sequence

from hdm.report.analysis import COSTS, Analysis, ratio
from hdm.report.numbers import Digits, p_value
from hdm.report.record import ArmRecord
from hdm.stats import Comparison, Verdict, least_seeds, minimal_effect

_LIMITS = {"steps": "optimizer steps", "samples": "samples", "flops": "training FLOPs", "seconds": "seconds of training"}
_EQUAL = 1.02  # a cost that differs by less counts as equal
_MOST_SENTENCES = 12


def digits(analysis: Analysis) -> Digits:
    """The decimals of the metric: two of the spread of paired differences, or of the spread over seeds."""
    spreads = [c.spread for c in analysis.comparisons.values()] or [s.spread(analysis.metric) for s in analysis.settings]
    return Digits.of([s.mean(analysis.metric) for s in analysis.settings], spreads)


def headline(analysis: Analysis) -> list[str]:
    """What the sweep showed, a sentence for each comparison while they are few, else for each that is decided."""
    found = list(analysis.comparisons.values())
    if not found:
        return [f"The sweep has one setting, {analysis.baseline.label}: there is nothing to compare it with."]
    decided = [c for c in found if c.verdict in (Verdict.better, Verdict.worse)]
    few = len(found) <= _MOST_SENTENCES
    order = {setting.label: number for number, setting in enumerate(analysis.settings)}
    spoken = sorted(found if few else decided[:_MOST_SENTENCES], key=lambda c: order[c.name])
    lines = [_sentence(analysis, comparison) for comparison in spoken]
    if not few:
        lines.append(f"{len(decided)} of {len(found)} settings differ from {analysis.baseline.label}; the table lists all of them.")
    if not analysis.record.confirmatory:
        lines.append(
            "This was a search, not a test: its arms were chosen, or stopped, by what others had measured, so the verdicts say what"
            " to test next. Repeat the best of them and the baseline with seeds=8 as a sweep of its own."
        )
    return lines


def _sentence(analysis: Analysis, c: Comparison) -> str:
    write = digits(analysis)
    if not c.differences:
        return f"{c.name}: not measured; {c.reason}."
    interval = ""
    if c.interval is not None:
        level = f"{100 * (1 - c.alpha):g} %"
        interval = f" ({level} interval {write.text(c.interval.low, sign=True)} to {write.text(c.interval.high, sign=True)})"
    seeds = f"{len(c.seeds)} paired seeds" if len(c.seeds) > 1 else "one seed"
    difference = f"{write.text(c.mean, sign=True)} in {analysis.metric}{interval}, {seeds}"
    holm = f", {p_value(c.adjusted_p)} after Holm over {c.comparisons}" if c.comparisons > 1 else ""
    p = f", p = {p_value(c.p)}{holm}" if len(c.seeds) > 1 else ""
    if c.verdict in (Verdict.better, Verdict.worse):
        return f"{c.name} is {c.verdict} than {analysis.baseline.label}: {difference}{p}."
    verdict = c.words[0].upper() + c.words[1:]
    return f"{c.name} against {analysis.baseline.label}: {difference}{p}. {verdict}."


def budget(analysis: Analysis) -> str:
    """The budget that the claim holds under, and what was not held equal."""
    arms = [arm for arm in analysis.record.arms if arm.params]
    iso = analysis.record.budget.get("iso")
    parts = [f"iso-{iso}: every arm got as many {iso} as {analysis.baseline.label}"] if iso else []
    for key, unit in _LIMITS.items():
        values = {arm.params.get(f"budget.{key}", "null") for arm in arms}
        if len(values) == 1 and (value := values.pop()) not in ("null", ""):
            parts.append(f"iso-{key}: every arm had a budget of {_count(value)} {unit}")
    if any(arm.params.get("matched", "''") not in ("''", "") for arm in arms):
        parts.append("sizes were matched (match=), see what was run")
    claim = "; ".join(parts) or "The arms had different budgets, so no comparison is at an equal budget"
    measured = [s for s in analysis.settings if s.finite(analysis.metric)]
    spread = {name: ratio(measured, key) for key, name in COSTS[:3]}
    unequal = [f"{name} ({factor:.2f}x)" for name, factor in spread.items() if factor > _EQUAL]
    more = f" Not equal between settings, largest over smallest: {', '.join(unequal)}." if unequal else ""
    return f"{claim[0].upper()}{claim[1:]}.{more}"


def planning(analysis: Analysis) -> str:
    """The smallest effect that these seeds could have shown; "" without a comparison."""
    found = [c for c in analysis.comparisons.values() if len(c.seeds) > 1]
    if not found:
        return ""
    seeds, count, alpha = min(len(c.seeds) for c in found), len(found), analysis.record.alpha
    among = f" and {count} comparisons" if count > 1 else ""
    spreads = sorted(c.spread for c in found)
    spread = spreads[len(spreads) // 2]
    size = minimal_effect(seeds, comparisons=count, alpha=alpha)
    if math.isinf(size):
        return (
            f"With {seeds} seeds{among} no difference, however large, can reach p < {alpha:g}:"
            f" it takes {least_seeds(comparisons=count, alpha=alpha)} seeds."
        )
    return (
        f"With {seeds} seeds{among}, a true difference of {Digits.of([size * spread], [spread]).text(size * spread)}"
        f" ({size:.2g} standard deviations of the paired differences) is found with a probability of 80 %."
    )


def noise(analysis: Analysis) -> str:
    """How wide the band is and where it comes from."""
    if analysis.noise is None:
        return "No A/A sweep was named (noise_floor=), so there is no noise band: verdicts rest on the interval and p alone."
    bands = [c.band for c in analysis.comparisons.values() if c.differences]
    write = Digits.of(bands, [analysis.noise.spread])
    width = f"± {write.text(max(bands))}" if bands else "–"
    among = "between equal arms of one seed" if analysis.noise.paired else "over the seeds of one arm"
    return (
        f"The noise band is {width}, from the A/A sweep {analysis.noise_name}: {analysis.noise.freedom} degrees of freedom,"
        f" standard deviation {write.text(analysis.noise.spread)} {among}. A mean difference inside it is called inconclusive."
    )


def method(analysis: Analysis) -> str:
    """How to read the table, for a reader who has nothing else."""
    direction = "less" if analysis.minimize else "more"
    level = f"{100 * (1 - analysis.record.alpha):g} %"
    return (
        f"{analysis.metric}, {direction} is better; mean ± standard deviation over seeds. Differences are paired by seed (equal"
        f" data, noise and initial values). Intervals are {level} t intervals of the mean difference, and BCa bootstrap intervals"
        " from 8 seeds; p counts sign flips, exactly up to 30 seeds, two-sided; Holm over all comparisons of the table. Better or"
        f" worse: Holm's p is below {analysis.record.alpha:g}, the t interval excludes 0 and the difference is outside the noise"
        " band. All seeds are shown."
    )


def warnings(analysis: Analysis) -> list[str]:
    """What a reader must know: arms that are missing, seeds without a partner, values that are not finite, mixed code, notes."""
    arms = analysis.record.arms
    lines = []
    states: dict[str, list[ArmRecord]] = {}
    for arm in arms:
        if not arm.finished:
            states.setdefault(arm.status, []).append(arm)
    for status, group in states.items():
        lines.append(f"{len(group)} of {len(arms)} arms {status}: {_names(group)}.")
    diverged = [a for a in arms if a.finished and not math.isfinite(a.metrics.get(analysis.metric, 0.0))]
    if diverged:
        lines.append(
            f"{analysis.metric} is not finite in {_names(diverged)}: left out of all means and tests, which favours the rest."
        )
    lacking = [a for a in arms if a.finished and analysis.metric not in a.metrics]
    if lacking:
        lines.append(f"{analysis.metric} was not measured in {_names(lacking)}.")
    unpaired = [c for c in analysis.comparisons.values() if c.left_out and c.differences]
    for c in unpaired[:_MOST_SENTENCES]:
        lacking_seeds = f"seed {c.left_out[0]} is" if len(c.left_out) == 1 else f"seeds {', '.join(map(str, c.left_out))} are"
        lines.append(f"{c.name} is compared over {len(c.seeds)} common seeds; {lacking_seeds} not in both arms.")
    if len(unpaired) > _MOST_SENTENCES:
        lines.append(f"{len(unpaired) - _MOST_SENTENCES} more settings are compared over fewer seeds than were run.")
    commits = {arm.tags.get("mlflow.source.git.commit", "") for arm in arms if arm.run_id} - {""}
    if len(commits) > 1:
        lines.append(f"The arms were made by {len(commits)} different commits of the code; see what was run.")
    if any(arm.tags.get("hdm.git.dirty") == "true" for arm in arms):
        lines.append("Some arms were made with uncommitted changes; each run keeps its git.diff.")
    return [*lines, *(f"{note[0].upper()}{note[1:]}." for note in analysis.notes)]


def _names(arms: Sequence[ArmRecord]) -> str:
    shown = ", ".join(f"{arm.label}{f' ({arm.reason[:120]})' if arm.reason else ''}" for arm in arms[:6])
    return shown + (f" and {len(arms) - 6} more" if len(arms) > 6 else "")


def _count(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
