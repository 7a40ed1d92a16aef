import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from hdm.config.schema import HardwareConfig, Precision
from hdm.train import cost
from hdm.train.budget import Clock
from hdm.train.cost import Speedometer, measure_peak
from hdm.train.progress import ProgressLine


def line(**kwargs):
    out = io.StringIO()
    return ProgressLine("run-x", fraction=0.25, clock=Clock(seconds=100.0), console=Console(file=out, width=60, **kwargs)), out


METRICS = {"train/loss": 0.51234, "speed/images_per_second": 37.123, "speed/mfu": 0.314, "cost/dollars": 1.5}


def test_words_of_a_line():
    progress, out = line()
    progress.metrics(Clock(steps=1200, samples=9600, seconds=400.0), 0.5, METRICS)
    expected = "run-x  50%  step 1,200  samples 9,600  loss 0.5123  37.12 images/s  MFU 31.4%  ETA 10:00  $1.50"
    assert out.getvalue().split() == expected.split()


def test_plain_lines_come_every_few_seconds_only():
    progress, out = line(soft_wrap=True)
    for step in range(50):
        progress.metrics(Clock(steps=step), 0.3, METRICS)
    assert out.getvalue().count("step") == 1


def test_on_a_terminal_a_bar():
    progress, out = line(force_terminal=True)
    with progress:
        progress.metrics(Clock(steps=12, seconds=7300.0), 0.5, METRICS)
        progress.note("skipped [red]x: [/] brackets are text")
    assert "━" in out.getvalue()
    assert "skipped [red]x: [/] brackets are text" in out.getvalue()


def test_hours_are_written_out():
    progress, _ = line()
    assert "ETA 3:00:00" in progress.words(Clock(seconds=100.0 + 3600), 0.4375)
    assert "ETA" not in progress.words(Clock(seconds=100.0), 0.25)


def test_speed_utilisation_and_cost():
    hardware = HardwareConfig(devices=2, peak_tflops=100.0, dollars_per_hour=0.5)
    start = Clock(samples=100, flops=1e15)
    start.spend(50.0, devices=1)  # a run that goes on with two
    speed = Speedometer(hardware=hardware, peak=2e14, last=start.copy(), devices=2)
    now = replace(start, samples=300, flops=5e15)
    now.spend(40.0, devices=2)
    assert speed.read(now) == {
        "speed/images_per_second": 5.0,
        "speed/mfu": pytest.approx(4e15 / 40 / 2e14),
        "cost/seconds": 90.0,
        "cost/flops": 5e15,
        "cost/gpu_hours": pytest.approx(130 / 3600),
        "cost/dollars": pytest.approx(65 / 3600),
    }
    later = Clock(samples=310, flops=5e15, seconds=100.0)
    assert speed.read(later)["speed/images_per_second"] == pytest.approx(1.0)


class Spent:
    """What the encoders of one process computed, FLOPs."""

    def __init__(self, *totals):
        self.totals = list(totals)

    def total(self):
        return self.totals.pop(0)


def test_recomputed_blocks_and_frozen_encoders_are_hardware_utilisation():
    """Two devices, of which each computes 4 passes for the 3 that count, and 1e15 FLOPs of encoders between two readings."""
    clock, hardware = Clock(), HardwareConfig(devices=4)
    speed = Speedometer(hardware=hardware, peak=2e14, last=clock, devices=2, passes=4, frozen=Spent(1e15, 2e15, None))
    for seconds in (40.0, 80.0):
        read = speed.read(Clock(samples=1, flops=1e14 * seconds, seconds=seconds, device_seconds=2 * seconds))
        assert read["speed/mfu"] == pytest.approx(0.5)
        assert read["speed/hfu"] == pytest.approx((4e15 * 4 / 3 + 2 * 1e15) / 40 / 2e14)
        assert read["cost/gpu_hours"] == pytest.approx(2 * seconds / 3600), "two devices ran, whatever the plan was made for"
    assert "speed/hfu" not in speed.read(Clock(samples=2, flops=1e16, seconds=100.0))


def test_device_hours_in_the_line():
    progress, _ = line()
    progress.metrics(Clock(), 0.5, {"cost/gpu_hours": 12.345, "cost/dollars": 4.63})
    assert progress.words(Clock(), 0.5).endswith("12.3 device h  $4.63")


def test_the_measured_peak_is_the_fastest_of_equal_matrix_products(monkeypatch):
    """By torch's own count of what was computed, and a clock that says how long each of eight took."""
    took = [4.0, 2.0, 0.5, 3.0, 1.0, 2.0, 8.0, 0.75]
    stamps = iter([stamp for i, seconds in enumerate(took) for stamp in (10.0 * i, 10.0 * i + seconds)])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(stamps))
    with FlopCounterMode(display=False) as counted:
        peak = measure_peak(torch.device("cpu"), Precision.fp32)
    assert peak == counted.get_total_flops() / len(took) / min(took)
    assert next(stamps, None) is None
