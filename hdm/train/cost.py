"""What training costs: counted FLOPs, speed against the machine's peak, dollars."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hdm.conditioning.cost import FrozenFlops
from hdm.config.schema import HardwareConfig, Precision, RunConfig
from hdm.model.backbone import Architecture
from hdm.model.flops import count_flops
from hdm.train.budget import Clock

_PASSES = 3  # forward, and a backward of twice its cost; recomputation is not progress and does not count


class Flops:
    """Training FLOPs of the backbone for one sample, by the shapes that it is given."""

    def __init__(self, run: RunConfig) -> None:
        self._architecture = Architecture.of(run)
        self._rate = getattr(run.routing, "rate", 0.0)
        self._known: dict[tuple[tuple[int, int], int], int] = {}

    def per_sample(self, grid: tuple[int, int], text_tokens: int) -> int:
        """FLOPs of one sample of `grid` image tokens with `text_tokens` of text, padding included."""
        key = (grid, text_tokens)
        if key not in self._known:
            forward = count_flops(self._architecture, grid=grid, text_tokens=text_tokens, rate=self._rate)
            self._known[key] = _PASSES * forward
        return self._known[key]


@dataclass(kw_only=True, slots=True)
class Speedometer:
    """Speed between two readings of the clock, and what the run has cost so far.

    `peak` is the FLOP/s of all `devices`, the processes that train; `passes` of the backbone are computed for the three that count,
    four where blocks are recomputed; `frozen` is what this process's encoders computed, every process doing the same.
    """

    hardware: HardwareConfig
    peak: float
    last: Clock
    devices: int = 1
    passes: int = _PASSES
    frozen: FrozenFlops | None = None
    last_frozen: float = 0.0

    @classmethod
    def of(
        cls, run: RunConfig, device: torch.device, clock: Clock, *, devices: int = 1, frozen: FrozenFlops | None = None
    ) -> "Speedometer":
        """For `run` on `devices` like `device`, starting at `clock`; measures the peak when the configuration names none."""
        tflops = run.hardware.peak_tflops
        peak = devices * (tflops * 1e12 if tflops else measure_peak(device, run.train.precision))
        passes = _PASSES + run.model.gradient_checkpointing
        return cls(hardware=run.hardware, peak=peak, last=clock.copy(), devices=devices, passes=passes, frozen=frozen)

    def read(self, clock: Clock) -> dict[str, float]:
        """Speed since the last reading and the costs so far, by metric name.

        speed/mfu: counted backbone FLOPs / time / peak. speed/hfu: the same with recomputed blocks and the frozen encoders, that is
        what `hardware.utilisation` of the plan means; left out where an encoder's FLOPs are not known.
        """
        seconds = max(clock.seconds - self.last.seconds, 1e-9)
        backbone = clock.flops - self.last.flops
        speeds = {
            "speed/images_per_second": (clock.samples - self.last.samples) / seconds,
            "speed/mfu": backbone / seconds / self.peak,
        }
        if self.frozen is not None and (total := self.frozen.total()) is not None:
            encoders = self.devices * (total - self.last_frozen)
            speeds["speed/hfu"] = (backbone * self.passes / _PASSES + encoders) / seconds / self.peak
            self.last_frozen = total
        self.last = clock.copy()
        hours = clock.device_seconds / 3600
        costs = {"cost/seconds": clock.seconds, "cost/flops": clock.flops, "cost/gpu_hours": hours}
        if self.hardware.dollars_per_hour is not None:
            costs["cost/dollars"] = hours * self.hardware.dollars_per_hour
        return speeds | costs


def measure_peak(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large matrix product on `device` in the training precision: the best of several."""
    side = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = min(_seconds(lambda: a @ a, device) for _ in range(8))
    return 2 * side**3 / best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
