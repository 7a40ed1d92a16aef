"""The plan against the report's published numbers, sums by hand, and tensors that autograd really saves."""

import os
import subprocess
import sys

import pytest
import torch

from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.lines import REPOSITORY
from hdm.config.schema import ModelConfig
from hdm.model import Architecture, Condition, Route, build
from hdm.model.memory import saved_bytes
from hdm.plan import Plan, plan, print_plan

NANO = ["experiment=none", "model=nano", "text_encoder=hash", "autoencoder=pixel", "crop.size=16", "model.patch=4"]


@pytest.fixture(scope="module")
def report() -> Plan:
    return plan(compose(["experiment=xut_base_full"]))


def test_steps_and_samples_of_the_report(report):
    assert [stage.steps for stage in report.stages] == [74_460, 82_705, 16_541, 14_253]  # spec 1.4
    assert [round(stage.samples / 1e6, 2) for stage in report.stages] == [152.49, 42.34, 8.47, 3.65]  # report, "Sample Seen"
    assert [stage.micro_batch for stage in report.stages] == [128, 64, 64, 16]  # report, "batch size (per gpu)"
    patches = [stage.patches() / 1e9 for stage in report.stages]
    assert patches == pytest.approx([39, 43.5, 19.5, 15], rel=0.01)  # report, "Patch Seen"


def test_the_table_of_the_documentation_is_the_plan(report):
    """Every cell of the rows that begin with "plan" in docs/training.md."""
    hours = [stage.hours for stage in report.stages]
    used = [0.4 * planned / reported for planned, reported in zip(hours, (174, 120, 42, 49))]

    def row(name, values, show, *, total=False):
        values = [*values, sum(values)] if total else values
        return [name, *(show.format(value) for value in values), *([] if total else [""])]

    rows = [
        row("plan: samples seen", [stage.samples / 1e6 for stage in report.stages], "{:.3f}M", total=True),
        row("plan: patches seen", [stage.patches() / 1e9 for stage in report.stages], "{:.2f}B", total=True),
        row("plan: steps", [stage.steps for stage in report.stages], "{:,}", total=True),
        row("plan: global batch", [stage.batch_size for stage in report.stages], "{}"),
        row("plan: batch per GPU", [stage.micro_batch for stage in report.stages], "{}"),
        row("plan: hours at 40 % of the peak", hours, "{:.1f}", total=True),
        row("plan: part of the peak that the report's hours mean", used, "{:.0%}"),
        row("plan: dollars", [stage.dollars for stage in report.stages], "{:.0f}", total=True),
    ]
    lines = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    there = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| plan: ")]
    assert there == rows


def test_parameters_by_part(report):
    d, m = 1024, 3072
    block = 3 * d * d + (d * d + d) + (d * 2 * m + 2 * m) + (m * d + d) + 2 * d
    cross = 3 * d * d + (d * d + d) + d
    assert report.parameters == {
        "patch": 16 * d + d,
        "time": d * d + d,
        "aspect": 2 * d + d * d + d,
        "text": d * d + d,
        "pre": block,
        "encoder": 4 * block,
        "decoder": 12 * block + 4 * cross,
        "post": 3 * block,
        "adaln": 3 * (2 * d + (4 * d * d + 4 * d) + (12 * d * d + 3 * d)),
        "out": 16 * d + 16,
    }
    assert report.total_parameters == 343_163_920


def test_hours_and_dollars_by_hand(report):
    """1024 px: 4096 image and 512 text tokens, nothing routed, every block computed twice, four cards of $0.375 an hour."""
    d, m, n, t = 1024, 3072, 4096, 4096 + 512

    def block(queries: int) -> int:
        return 3 * d * d * t + 2 * t * queries * d + d * d * queries + 3 * d * m * queries

    macs = 19 * block(t) + block(n) + 4 * (4 * d * d * t + 2 * t * t * d)  # the last block gives image tokens only
    macs += 2 * n * 16 * d + 512 * d * d + (2 * d * d + d) + 3 * 16 * d * d
    stage = report.stages[-1]
    assert stage.forward == stage.forward_unrouted == 2 * macs
    assert stage.train == 4 * 2 * macs
    assert stage.encoders == pytest.approx(2 * 0.241e12 + 4.879e12, rel=0.02)  # measured: Qwen3 on 256 tokens, VAE at 1024 px
    hours = 14_253 * 256 * (stage.train + stage.encoders) / (4 * 209.5e12 * 0.4) / 3600
    assert stage.hours == pytest.approx(hours)
    assert stage.dollars == pytest.approx(hours * 4 * 0.375)


def test_a_run_without_stages_follows_its_budget():
    at = {key: plan(compose([*NANO, "train.batch_size=8", f"budget.{key}={value}"])).stages[0] for key, value in
          {"steps": 5, "samples": 41, "flops": 1.0}.items()}  # fmt: skip
    assert [(at[key].steps, at[key].samples) for key in at] == [(5, 40), (6, 48), (1, 8)]
    stage = at["steps"]
    steps = 7
    budget = f"budget.flops={steps * 8 * 3 * stage.forward}"
    assert plan(compose([*NANO, "train.batch_size=8", budget])).stages[0].steps == steps


def test_weights_gradients_moments_and_averages_in_fp32():
    both, none = (plan(compose([*NANO, *ema])) for ema in ([], ["ema.power=0", "ema.decay=0"]))
    assert both.stages[0].memory - none.stages[0].memory == 2 * 4 * both.total_parameters


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_bytes_are_what_autograd_saves(rate, checkpointing):
    """A real forward pass under autocast, with every storage that the backward pass holds counted once."""
    size = ModelConfig(dim=64, mlp_dim=192, heads=2, head_dim=32, depth=2, dec_blocks=2, gradient_checkpointing=checkpointing)
    architecture = Architecture(size=size, context_dim=24)
    batch, grid, text = 3, (6, 4), 5
    model = build(architecture, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    condition = Condition(text=torch.randn(batch, text, 24), position=torch.rand(batch, 24, 2), aspect=torch.zeros(batch))
    route = Route(noise=torch.rand(batch, 24), rate=rate)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(batch, 4, 12, 8), torch.rand(batch), condition, route=route)
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights)
    estimated = saved_bytes(architecture, batch=batch, grid=grid, text_tokens=text, rate=rate)
    assert out.shape == (batch, 4, 12, 8)
    assert estimated == pytest.approx(measured, rel=0.01)


def test_what_is_not_known_is_said(capsys):
    print_plan(compose(NANO))
    out = " ".join(capsys.readouterr().out.split())
    assert "hours: not known without a peak; name the machine, hardware=rtx5090x4" in out
    assert "steps: not known without a limit; set budget.steps" in out


def test_small_runs_are_not_rounded_to_nothing(capsys):
    print_plan(compose([*NANO, "budget.steps=10", "hardware.peak_tflops=1"]))
    out = capsys.readouterr().out
    (forward,) = (line for line in out.splitlines() if "GFLOP/sample: forward" in line)
    assert float(forward.split()[-1]) > 0.01
    assert "not known" not in out


def test_sizes_that_no_grid_tiles():
    with pytest.raises(
        ConfigError, match=r"stages\.256px\.crop\.size=250: is not a positive multiple of .* = 8 x 2 = 16; set crop\.size=256"
    ):
        plan(compose(["stages.256px.epochs=1", "stages.256px.crop.size=250"]))


@pytest.mark.slow
def test_dry_run_takes_no_memory_for_the_network():
    """The network and its states would take 8 GB, its activations 80.

    The peak is read from /proc: getrusage's outlives exec, and would be that of the process of the tests.
    """
    code = """
import pathlib, re, runpy, sys
sys.argv = ["hdm.run", "experiment=xut_base_full", "--dry-run"]
try:
    runpy.run_module("hdm.run", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
print("kB", re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    table, _, peak = done.stdout.rpartition("kB")
    assert int(peak) < 1_500_000
    assert max(map(len, table.splitlines())) <= 80
    assert "backbone of 343,163,920 parameters" in table
    assert "256px: 90 GB do not fit in 32 GB" in table
