"""What a run costs before it costs anything: parameters, FLOPs, memory, steps, hours, dollars. `python -m hdm.run … --dry-run`.

The network is built on the meta device (no memory), FLOPs are counted there operator by operator, and activations are what autograd
would keep in a forward pass over fake tensors. A training step is three forward passes of the backbone, four with gradient
checkpointing, plus one of each frozen encoder. Hours assume `hardware.utilisation` of the peak on all of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm.config import compat
from hdm.config.identity import label
from hdm.config.schema import HardwareConfig, RunConfig


@dataclass(kw_only=True, slots=True)
class StagePlan:
    """One stage in numbers; FLOPs are per sample."""

    name: str
    size: int
    grid: tuple[int, int]
    text_tokens: int
    routing_rate: float
    batch_size: int
    micro_batch: int
    steps: int | None
    samples: int | None
    forward: int
    forward_unrouted: int
    train: int
    encoders: int | None
    memory: int
    hours: float | None = None
    dollars: float | None = None

    def patches(self) -> int | None:
        """Image tokens of all samples, routed around or not."""
        return None if self.samples is None else self.samples * self.grid[0] * self.grid[1]

    def gpu_hours(self, hardware: HardwareConfig) -> float | None:
        """Hours of all devices."""
        return None if self.hours is None else self.hours * hardware.devices


@dataclass(kw_only=True, slots=True)
class Plan:
    """A whole run in numbers."""

    parameters: dict[str, int]
    stages: list[StagePlan]

    @property
    def total_parameters(self) -> int:
        """Trainable parameters of the backbone."""
        return sum(self.parameters.values())


def plan(run: RunConfig) -> Plan:
    """Count `run` on the meta device."""
    from hdm.model import Architecture, build

    architecture = Architecture.of(run)
    parameters: dict[str, int] = {}
    for name, parameter in build(architecture, seed=None).named_parameters():
        part = name.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    total = sum(parameters.values())
    encoders = _Encoders()
    stages = [_stage(own, name, length, total, encoders) for own, name, length in _staged(run)]
    return Plan(parameters=parameters, stages=stages)


def _stage(run: RunConfig, name: str, length: int | None, parameters: int, encoders: "_Encoders") -> StagePlan:
    """`run` in numbers, as a stage of `length` steps; None: as long as its budget."""
    from hdm.model import Architecture
    from hdm.model.flops import count_flops
    from hdm.model.memory import saved_bytes

    side = run.crop.size // (run.autoencoder.factor * run.model.patch)
    rate, text = getattr(run.routing, "rate", 0.0), run.text_encoder.max_length
    batch, architecture = run.train.batch_size, Architecture.of(run)
    forward = count_flops(architecture, grid=(side, side), text_tokens=text, rate=rate)
    steps = _budgeted(run, forward) if length is None else length
    per_device = math.ceil(batch / (run.train.accumulation * run.hardware.devices))
    result = StagePlan(
        name=name,
        size=run.crop.size,
        grid=(side, side),
        text_tokens=text,
        routing_rate=rate,
        batch_size=batch,
        micro_batch=per_device,
        steps=steps,
        samples=None if steps is None else steps * batch,
        forward=forward,
        forward_unrouted=forward if rate == 0 else count_flops(architecture, grid=(side, side), text_tokens=text, rate=0.0),
        train=(4 if run.model.gradient_checkpointing else 3) * forward,
        encoders=encoders.flops(run, run.crop.size, text),
        memory=_states(run, parameters)
        + saved_bytes(architecture, batch=per_device, grid=(side, side), text_tokens=text, rate=rate),
    )
    hardware = run.hardware
    if hardware.peak_tflops and result.samples:
        per_second = hardware.devices * hardware.peak_tflops * 1e12 * hardware.utilisation
        seconds = result.samples * (result.train + (result.encoders or 0)) / per_second
        result.hours = seconds / 3600
        if hardware.dollars_per_hour:
            result.dollars = result.hours * hardware.devices * hardware.dollars_per_hour
    return result


def _staged(run: RunConfig) -> Iterator[tuple[RunConfig, str, int | None]]:
    """Each stage as a run, with its name and its steps where they are known; a run without stages is its own only one."""
    from hdm.config.compose import stage_run
    from hdm.train.stages import steps

    for stage in run.stages:
        own = stage_run(run, stage)
        yield own, stage.name, steps(stage, own, _images)
    if not run.stages:
        yield run, label(run), None


def _images(run: RunConfig) -> int:
    """The training images of a run: what its data set says of itself, or holds."""
    from hdm.config.axes import DATA

    declared: int | None = getattr(run.data, "images", None)
    return declared or len(DATA.build(run.data).open(Path(run.datasets), "train"))


def _budgeted(run: RunConfig, forward: int) -> int | None:
    """Optimizer steps that the budget allows; None without a limit that says."""
    budget, batch = run.budget, run.train.batch_size
    limits = [
        budget.steps,
        None if budget.samples is None else math.ceil(budget.samples / batch),
        None if budget.flops is None else math.ceil(budget.flops / (3 * forward * batch)),
    ]
    return min((limit for limit in limits if limit is not None), default=None)


class _Encoders:
    """The frozen networks of the stages, of which each is counted once for a length or size."""

    def __init__(self) -> None:
        self._known: dict[str, int | None] = {}

    def flops(self, run: RunConfig, size: int, text_tokens: int) -> int | None:
        """Of one caption through the text encoder and one image through the autoencoder; None when either is not known."""
        from hdm.conditioning.cost import autoencoder_flops, text_encoder_flops

        text = self._once(text_encoder_flops, run.text_encoder, text_tokens)
        image = self._once(autoencoder_flops, run.autoencoder, size)
        return None if text is None or image is None else text + image

    def _once(self, count: Callable[[Any, int], int | None], config: Any, size: int) -> int | None:
        key = f"{config!r} {size}"
        if key not in self._known:
            self._known[key] = count(config, size)
        return self._known[key]


def _states(run: RunConfig, parameters: int) -> int:
    """Bytes of weights, gradients, what the optimizer keeps of each and the averages, all fp32."""
    averages = len(run.ema.powers()) + (run.ema.decay > 0)
    return parameters * 4 * (1 + 1 + getattr(run.optimizer, "kept", 2) + averages)


def planned(run: RunConfig, measured: Mapping[str, float]) -> dict[str, float]:
    """`cost/planned_hours`: what the plan expects of as many devices as `measured` says there were. {} where no peak is known."""
    seconds, device_hours = measured.get("cost/seconds"), measured.get("cost/gpu_hours")
    if not (run.hardware.peak_tflops and seconds and device_hours):
        return {}
    hours = [stage.gpu_hours(run.hardware) for stage in plan(run).stages]
    known = [own for own in hours if own is not None]
    return {"cost/planned_hours": sum(known) / (device_hours * 3600 / seconds)} if len(known) == len(hours) else {}


# --- print ------------------------------------------------------------------------------------------------------------


def print_plan(run: RunConfig) -> None:
    """Print the plan of `run` as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    with console.status("counting on the meta device …"):
        result = plan(run)
    console.print(f"[bold]{label(run)}[/]: backbone of {result.total_parameters:,} parameters")
    parts = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    parts.add_column("share", justify="right")
    for name, count in result.parameters.items():
        parts.add_row(name, f"{count:,}", f"{count / result.total_parameters:.1%}")
    console.print(parts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for stage in result.stages:
        table.add_column(stage.name, justify="right")
    total = len(result.stages) > 1
    if total:
        table.add_column("total", justify="right")
    for row in _rows(result.stages, run.hardware):
        table.add_row(row.label, *row.cells(), *([row.total()] if total else []))
    console.print(table)
    for note in (*_notes(run, result.stages), *_snapshots(run, result)):
        console.print(note)


def _notes(run: RunConfig, stages: list[StagePlan]) -> Iterator[str]:
    """What a reader of the table must know: what does not fit, what is unknown and how to make it known, what is assumed."""
    from hdm.conditioning.sizes import cache_notes

    if run.matched:
        yield f"match: {run.matched}"
    yield from compat.adapters(run)
    hardware = run.hardware
    for stage in stages:
        if _too_large(stage.memory, hardware):
            yield (
                f"[red]{stage.name}: {stage.memory / 1e9:.0f} GB do not fit in {hardware.memory_gb:g} GB;[/]"
                " raise accumulation, or switch gradient_checkpointing on"
            )
    if any(stage.steps is None for stage in stages):
        yield "[yellow]steps:[/] not known without a limit; set budget.steps, budget.samples or budget.flops"
    if hardware.peak_tflops is None:
        yield "[yellow]hours:[/] not known without a peak; name the machine, hardware=rtx5090x4, or set hardware.peak_tflops"
    else:
        machine = f"{hardware.devices} x {hardware.name.split(' x ')[-1]}"
        yield f"hours: on {machine}, {hardware.peak_tflops:g} TFLOP/s bf16 each, of which {hardware.utilisation:.0%} are used"
    if any(stage.encoders is None for stage in stages):
        yield "[yellow]frozen encoders:[/] of a size that is not known here; FLOPs, hours and dollars are without them"
    yield "text: every caption is taken to have as many tokens as may be; shorter ones cost less"
    yield from cache_notes(run)
    if "square" in getattr(run.crop, "takes", {}):
        yield f"crops: counted as squares of crop.size, but {run.crop.takes['square']}"
    yield "memory: fp32 states and what autograd saves; the frozen encoders and a block in recomputation come on top"


def _snapshots(run: RunConfig, result: Plan) -> Iterator[str]:
    """What the snapshots of the averages need on disk."""
    from hdm.train.snapshots import size

    known = [stage.samples for stage in result.stages if stage.samples is not None]
    if run.ema.snapshot_every and len(known) == len(result.stages):
        count, each = size(run.ema, parameters=result.total_parameters, samples=sum(known))
        yield f"snapshots of averages: {count} of {each / 1e9:.3g} GB, {count * each / 1e9:.3g} GB in all (ema.snapshot_every)"


@dataclass(kw_only=True, slots=True)
class _Row:
    """A line of the table: a number of each stage, how to write it, whether the stages' numbers add up."""

    label: str
    values: list[float | None]
    show: Callable[[float], str] = str
    adds: bool = False

    def cells(self) -> list[str]:
        return ["?" if value is None else self.show(value) for value in self.values]

    def total(self) -> str:
        known = [value for value in self.values if value is not None]
        return self.show(sum(known)) if self.adds and known else ""


def _rows(stages: list[StagePlan], hardware: HardwareConfig) -> list[_Row]:
    def each(number: Callable[[StagePlan], float | None]) -> list[float | None]:
        return [number(stage) for stage in stages]

    def gigabytes(value: float) -> str:
        return f"[red]{value / 1e9:,.1f}[/]" if _too_large(value, hardware) else f"{value / 1e9:,.1f}"

    def samples(value: float) -> str:
        return f"{value:,}" if value < 1e6 else f"{value / 1e6:,.3f} M"

    def patches(value: float) -> str:
        return samples(value) if value < 1e9 else f"{value / 1e9:,.2f} B"

    def plain(digits: int) -> Callable[[float], str]:
        return lambda value: f"{value:,.{digits}f}"

    each_flop = _prefix(max(stage.train for stage in stages))
    totals = each(lambda s: None if s.samples is None else s.samples * (s.train + (s.encoders or 0)))
    all_flop = _prefix(max((total for total in totals if total is not None), default=1e18))

    def per_sample(value: float) -> str:
        return f"{value / each_flop[1]:,.3f}"

    rows = [
        _Row(label="image tokens", values=each(lambda s: s.grid[0] * s.grid[1])),
        _Row(label="text tokens, at most", values=each(lambda s: s.text_tokens)),
        _Row(label="routed around", values=each(lambda s: s.routing_rate), show="{:.0%}".format),
        _Row(label="global batch", values=each(lambda s: s.batch_size)),
        _Row(label="micro-batch per device", values=each(lambda s: s.micro_batch)),
        _Row(label="steps", values=each(lambda s: s.steps), show=plain(0), adds=True),
        _Row(label="samples", values=each(lambda s: s.samples), show=samples, adds=True),
        _Row(label="patches", values=each(StagePlan.patches), show=patches, adds=True),
        _Row(label=f"{each_flop[0]}FLOP/sample: forward", values=each(lambda s: s.forward), show=per_sample),
        _Row(label="  forward, unrouted", values=each(lambda s: s.forward_unrouted), show=per_sample),
        _Row(label="  training", values=each(lambda s: s.train), show=per_sample),
        _Row(label="  frozen encoders", values=each(lambda s: s.encoders), show=per_sample),
        _Row(label=f"{all_flop[0]}FLOP in all", values=totals, show=lambda v: f"{v / all_flop[1]:,.3g}", adds=True),
        _Row(label="GB per device", values=each(lambda s: s.memory), show=gigabytes),
        _Row(label="hours", values=each(lambda s: s.hours), show=plain(1), adds=True),
        _Row(label="GPU-hours", values=each(lambda s: s.gpu_hours(hardware)), show=plain(1), adds=True),
    ]
    if any(stage.dollars for stage in stages):
        rows.append(_Row(label="dollars", values=each(lambda s: s.dollars), show=plain(0), adds=True))
    return rows


def _too_large(memory: float, hardware: HardwareConfig) -> bool:
    return hardware.memory_gb is not None and memory > hardware.memory_gb * 1e9


def _prefix(largest: float) -> tuple[str, float]:
    """The SI prefix under which `largest` is 0.1 or more, and its power of ten."""
    prefixes = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))
    return next(((name, power) for name, power in prefixes if largest >= power / 10), ("M", 1e6))
