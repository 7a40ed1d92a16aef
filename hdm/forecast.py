"""What a sweep costs and what it can show, before it costs anything: `python -m hdm.sweep … --plan`."""

import math
from dataclasses import dataclass

from hdm import cli
from hdm.launch.arm import Arm
from hdm.launch.campaign import Sweep, progress_of
from hdm.launch.grammar import intervals, points
from hdm.launch.options import Search


@dataclass(kw_only=True, slots=True)
class Cost:
    """One run of a setting; None for what is not known, see `unknown`."""

    parameters: int
    flops: float | None
    hours: float | None
    dollars: float | None


def cost(arm: Arm) -> Cost:
    """What `arm` costs by the plan of its run; hours are those of its devices together."""
    from hdm.plan import plan

    result = plan(arm.run)
    devices = arm.run.hardware.devices

    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return Cost(
        parameters=result.total_parameters,
        flops=total([None if s.samples is None else float(s.samples * (s.train + (s.encoders or 0))) for s in result.stages]),
        hours=total([None if s.hours is None else s.hours * devices for s in result.stages]),
        dollars=total([s.dollars for s in result.stages]),
    )


def print_forecast(sweep: Sweep) -> None:
    """Print the arms, what is there of each, what they cost, and the smallest effect that the seeds can show."""
    for arm in sweep.arms:
        print(f"{arm.label:<40} {progress_of(arm):<12} {arm.folder}")
    options = sweep.options
    if not sweep.arms:
        tried = ", ".join(f"{axis.key} in {axis.interval}" for axis in intervals(sweep.axes.values()))
        print(
            f"{options.trials} trials of search={options.search.name}, {len(sweep.seeds)} runs each"
            + (f": {tried}" if tried else "")
        )
    else:
        print(f"{len(sweep.arms)} arms, ranked by {options.metric} ({options.direction.name}), in {sweep.folder}")
        _print_costs(sweep)
    for line in power(sweep):
        print(line)


def _print_costs(sweep: Sweep) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, list[Arm]] = {}
    for arm in sweep.arms:
        groups.setdefault(arm.setting, []).append(arm)
    costs: dict[str, Cost] = {}
    with cli.progress("counting on the meta device", total=len(groups), unit="settings") as advance:
        for setting, arms in groups.items():
            costs[setting] = cost(arms[0])
            advance(1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("setting", "seeds", "parameters", "PFLOP", "GPU-hours", "dollars"):
        table.add_column(column, justify="left" if column == "setting" else "right", overflow="fold")
    for setting, one in costs.items():
        count = len(groups[setting])
        table.add_row(setting, str(count), f"{one.parameters:,}", *_amounts(one, count))
    table.add_row("all", str(len(sweep.arms)), "", *_sums([(costs[s], len(arms)) for s, arms in groups.items()]))
    Console(highlight=False).print(table)
    if any(one.hours is None for one in costs.values()):
        print("hours: not known without a peak; name the machine, hardware=rtx5090x4, or set hardware.peak_tflops")
    elif any(one.dollars is None for one in costs.values()):
        print("dollars: not known without a price; set hardware.dollars_per_hour")


def power(sweep: Sweep) -> list[str]:
    """What the seeds can show at best, in words."""
    if sweep.options.search is not Search.grid:
        return ["a search ranks by what it sees and confirms nothing; confirm its best setting in a grid with seeds of its own"]
    comparisons, seeds, alpha = len(list(points(sweep.axes.values()))) - 1, len(sweep.seeds), sweep.options.alpha
    if comparisons < 1:
        return [f"one setting with {seeds} seeds: their spread is the noise floor of other sweeps"]
    from hdm import stats

    effect = stats.minimal_effect(seeds, comparisons=comparisons, alpha=alpha)
    least = stats.least_seeds(comparisons=comparisons, alpha=alpha)
    among = f"{comparisons} comparison{'s' if comparisons > 1 else ''} at alpha={alpha:g}"
    if math.isinf(effect):
        return [f"{seeds} seeds can show nothing in {among}, however large it is; seeds={least} is the least"]
    return [
        f"smallest effect that {seeds} seeds show in {among}: {effect:.2f} standard deviations of the paired differences,"
        " 4 times in 5"
    ]


def _amounts(one: Cost, count: int) -> list[str]:
    return _sums([(one, count)])


def _sums(costs: list[tuple[Cost, int]]) -> list[str]:
    """FLOPs, hours and dollars of so many runs each."""

    def total(values: list[float | None]) -> float | None:
        return sum(v * n for v, (_, n) in zip(values, costs) if v is not None) if None not in values else None

    flops, hours, dollars = (total([getattr(one, name) for one, _ in costs]) for name in ("flops", "hours", "dollars"))
    return [
        "?" if flops is None else f"{flops / 1e15:,.3g}",
        "?" if hours is None else f"{hours:,.2f}",
        "?" if dollars is None else f"{dollars:,.2f}",
    ]
