"""What the parts of the recipe cost or save in a training step, as ratios to a baseline measured in the same minutes.

usage: python -m benchmarks.train_step [model=nano|tiny|small|base] [rounds=7] [arms=compiled,…]

Every round times one step of each arm in turn (A B C A B C …); the table gives the median over rounds of (arm / baseline of the
same round), so that a machine that is busy or throttles moves both. Baseline: merge=cross, bf16 autocast, TREAD 0.5, 64 text
tokens, 256 image tokens, batch 8.
"""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from hdm import cli
from hdm.config.axes import discover
from hdm.config.errors import HdmError
from hdm.config.schema import MODELS, ParallelConfig
from hdm.model import Architecture, Condition, Route, build, full_view
from hdm.train.parallel import World, spread

BATCH, GRID, TEXT = 8, 16, 64


def step(
    architecture: Architecture, *, text: int = TEXT, rate: float = 0.5, bf16: bool = True, compiled: bool = False
) -> Callable[[], None]:
    """A function that takes one training step: forward, backward, AdamW."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(architecture, device=device, seed=0)
    spread(model, nn.Module(), ParallelConfig(compile=compiled), World())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    side = GRID * architecture.size.patch
    with torch.device(device):
        x, time_ = torch.zeros(BATCH, architecture.in_channels, side, side), torch.full((BATCH,), 0.5)
        condition = Condition(
            text=torch.zeros(BATCH, text, architecture.context_dim),
            position=model.position_map(full_view(side, side, BATCH).to(device), (GRID, GRID)),
            aspect=torch.zeros(BATCH),
        )
        route = Route(noise=torch.linspace(0, 1, GRID * GRID).repeat(BATCH, 1), rate=rate)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            velocity = model(x, time_, condition, route=route)
        velocity.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def arms(size: str, wanted: str | None) -> dict[str, Callable[[], None]]:
    """The steps to compare, the baseline first; with `wanted` it and the named ones alone."""
    axes = discover()
    base = Architecture(size=MODELS[size])
    make = functools.partial(functools.partial, step)
    checkpointing = dataclasses.replace(base.size, gradient_checkpointing=True)
    found = {
        "baseline": make(base),
        "compiled": make(base, compiled=True),
        "fp32": make(base, bf16=False),
        "fp32 compiled": make(base, bf16=False, compiled=True),
        "routing none": make(base, rate=0.0),
        "routing 0.75": make(base, rate=0.75),
        "text 128 tokens": make(base, text=128),
        "text 256 tokens (untrimmed)": make(base, text=256),
        "gradient checkpointing": make(dataclasses.replace(base, size=checkpointing)),
    }
    for axis, names in {"merge": ["concat", "add", "none"], "adaln": ["per_layer", "single"]}.items():
        for name in names:
            found[f"{axis} {name}"] = make(dataclasses.replace(base, **{axis: axes[axis].get(name).config()}))
    chosen = ["baseline", *wanted.split(",")] if wanted else list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise HdmError(f"arms={unknown[0]}: no such arm (there are {', '.join(found)})")
    return {name: found[name]() for name in chosen}


def command(arguments: list[str]) -> None:
    """Measure and print a Markdown table."""
    size = cli.take_option(arguments, "model") or "tiny"
    rounds = int(cli.take_option(arguments, "rounds") or 7)
    wanted = cli.take_option(arguments, "arms")
    cli.reject_unknown(arguments, "usage: python -m benchmarks.train_step [model=tiny] [rounds=7] [arms=compiled,…]")
    steps = arms(size, wanted)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for name, run in steps.items():
            began = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - began)
            else:  # warms up, and compiles
                first[name] = time.perf_counter() - began
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    print(f"model={size}, batch {BATCH}, {GRID * GRID} image tokens, {device}, torch {torch.__version__}, {rounds} rounds\n")
    print("| arm | median step (ms) | time / baseline | first step (s) |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, seconds["baseline"]))
        print(f"| {name} | {1000 * statistics.median(times):.0f} | {ratio:.2f} | {first[name]:.1f} |")


if __name__ == "__main__":
    cli.main(command, __doc__ or "")
