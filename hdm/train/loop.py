"""Training: one loop whose state is the number of samples seen. Giving the same command again continues the run."""

import time
from itertools import islice
from pathlib import Path

import torch

from hdm.config.axes import ALIGNMENT, DATA, OBJECTIVE, SCHEDULE
from hdm.config.errors import ConfigError
from hdm.config.schema import Precision, RunConfig
from hdm.data.loader import training_batches
from hdm.model import Architecture, build
from hdm.train.budget import limits, used
from hdm.train.checkpoint import latest
from hdm.train.cost import Flops
from hdm.train.examples import Examples
from hdm.train.grid import SampleGrid
from hdm.train.observer import Observer, TrainResult
from hdm.train.optimizer import clipped_step, set_rate
from hdm.train.recorder import Recorder
from hdm.train.signals import StopRequest
from hdm.train.state import TrainState
from hdm.train.validation import Validation
from hdm.train.warmstart import warm_start

__all__ = ["TrainResult", "train"]


def train(run: RunConfig, folder: Path, recorder: Recorder) -> TrainResult:
    """Train `run` in `folder` until its budget is used, from the newest complete checkpoint there if there is one.

    Raises ConfigError without a budget, DataError for data that cannot be read, CheckpointError when a checkpoint cannot be written
    or does not fit, TrainingError when a loss or gradient is not finite. The last good checkpoint stays, whatever happens.
    """
    limits(run.budget)
    device = pick_device(run.device)
    source = DATA.build(run.data)
    shards, held_out = source.open(Path(run.datasets), "train"), source.open(Path(run.datasets), "val")
    recorder.dataset(shards.name, shards.digest, "train")
    recorder.dataset(held_out.name, held_out.digest, "validation")

    examples, objective, schedule, flops = (
        Examples(run, device),
        OBJECTIVE.build(run.objective),
        SCHEDULE.build(run.schedule),
        Flops(run),
    )
    data = {"training": shards.digest, "validation": held_out.digest}
    network = warm_start(run, build(Architecture.of(run), device=device, seed=run.seed), folder)
    alignment = ALIGNMENT.build(run.alignment, run, network, device=device)
    state = TrainState.initial(run, network, data=data, alignment=alignment)
    if start := latest(folder):
        state.restore(start)
    model, clock, optimizer = state.model, state.clock, state.optimizer
    validation, grid = Validation(run, held_out, examples, objective), SampleGrid(run, held_out, examples, model)
    observer = Observer(run, folder, recorder=recorder, state=state, validation=validation, grid=grid, start=start)

    batch_size, parts = run.train.batch_size, run.train.accumulation
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.train.precision is Precision.bf16)
    with observer.progress, StopRequest() as stop:
        observer.begin()
        batches = training_batches(run, shards, start=clock.samples, batch_size=batch_size // parts)
        model.train()
        while (progress := used(run.budget, clock)) < 1 and not stop.requested:
            began, before = time.perf_counter(), clock.samples
            observer.meter.begin(clock.steps + 1)
            for batch in islice(batches, parts):
                x = examples.draw(batch, model)
                tap, target = alignment.tap(), alignment.target(batch.pixels, examples.grid(batch.pixels))
                with bf16:
                    losses = objective.loss(
                        model, x.latents, noise=x.noise, timestep=x.timestep, condition=x.condition, route=x.route, tap=tap
                    )
                    apart = alignment.loss(tap, target)
                total = losses if apart is None else losses + alignment.weight * apart
                (total.sum() / batch_size).backward()
                clock.flops += len(batch) * flops.per_sample(examples.grid(batch.pixels), x.condition.text.shape[1])
                observer.meter.losses(batch, losses, alignment=apart)
                observer.skipped(batch)
            rate = schedule.factor(step=clock.steps + 1, progress=progress)
            set_rate(optimizer, rate)
            observer.meter.norm(clipped_step(optimizer, run.train.clip))
            clock.steps += 1
            clock.samples += batch_size
            state.averages.update(samples=clock.samples, fresh=batch_size)
            observer.step(before, rate=rate, seconds=time.perf_counter() - began)
        return observer.finish()


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}; use device=auto or device=cpu") from None
    return device
