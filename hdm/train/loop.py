"""Training: one loop whose state is the number of samples seen. Giving the same command again continues the run.

A run of several stages takes the loop once for each. What the next one starts from is the checkpoint of the one before, read as any
interrupted run reads its own.
"""

import time
from itertools import islice
from pathlib import Path

import torch

from hdm.config.axes import ALIGNMENT, DATA, OBJECTIVE, SCHEDULE
from hdm.config.errors import ConfigError
from hdm.config.schema import Precision, RunConfig
from hdm.data.loader import training_batches
from hdm.model import Architecture, build
from hdm.train.checkpoint import Writer, latest
from hdm.train.cost import Flops
from hdm.train.examples import Examples, require_caches
from hdm.train.grid import SampleGrid
from hdm.train.observer import Evaluate, Observer, TrainResult
from hdm.train.oom import explained
from hdm.train.optimizer import clipped_step, set_rate
from hdm.train.parallel import World, check_optimizer, last_only, replicated, spread, together, world
from hdm.train.recorder import Recorder
from hdm.train.signals import StopRequest
from hdm.train.stages import Stage, stages
from hdm.train.state import TrainState, has_parameters
from hdm.train.validation import Validation
from hdm.train.warmstart import warm_start

__all__ = ["TrainResult", "train"]


def train(run: RunConfig, folder: Path, recorder: Recorder, *, evaluate: Evaluate | None = None) -> TrainResult:
    """Train `run` in `folder` until its stages or its budget end, from the newest complete checkpoint there if there is one.

    `evaluate` is given a checkpoint that has just been written, every `eval.every` samples.
    Raises ConfigError without an end, DataError for data that cannot be read, CheckpointError when a checkpoint cannot be written
    or does not fit, TrainingError when a loss or gradient is not finite, memory runs out, or another process is gone. The last good
    checkpoint stays, whatever happens.
    """
    check_optimizer(run)
    with world(run, pick_device(run.device)) as here, StopRequest() as stop:
        todo = stages(run, lambda own: len(DATA.build(own.data).open(Path(own.datasets), "train")))
        if len(todo) > 1:
            _same_network(todo)
        require_caches([stage.run for stage in todo], here.device)
        start: Path | None = here.gathered(latest(folder) if here.main else None)[0]
        with Writer(start, here) as writer:
            for stage in todo:
                if start is not None and stage.end is not None and not stage.last and _samples(start) >= stage.end:
                    continue
                with together(here.size), explained(stage.run, here.size):
                    result = _train(stage, folder, recorder, here=here, stop=stop, start=start, writer=writer, evaluate=evaluate)
                start = result.checkpoint
                if result.status != "finished":
                    break
            return result


def _train(
    stage: Stage,
    folder: Path,
    recorder: Recorder,
    *,
    here: World,
    stop: StopRequest,
    start: Path | None,
    writer: Writer,
    evaluate: Evaluate | None,
) -> TrainResult:
    run, device = stage.run, here.device
    source = DATA.build(run.data)
    shards, held_out = source.open(Path(run.datasets), "train"), source.open(Path(run.datasets), "val")
    recorder.dataset(shards.name, shards.digest, "train")
    recorder.dataset(held_out.name, held_out.digest, "validation")

    examples, objective, schedule, flops = (
        Examples(run, device, data=shards.digest),
        OBJECTIVE.build(run.objective),
        SCHEDULE.build(run.schedule),
        Flops(run),
    )
    network = warm_start(run, build(Architecture.of(run), device=device, seed=run.seed), fresh=start is None)
    alignment = ALIGNMENT.build(run.alignment, run, network, device=device)
    spread(network, alignment, run.parallel, here)
    data = {"training": shards.digest, "validation": held_out.digest}
    state = TrainState.initial(run, network, data=data, alignment=alignment)
    if start is not None:
        state.restore(start, world=here, stage=stage.number, moments=stage.moments)
    clock, optimizer, model = state.clock, state.optimizer, replicated(network, run.parallel, here)
    validation = Validation(run, held_out, examples, objective, world=here)
    grid = SampleGrid(run, held_out, examples, network, world=here)
    observer = Observer(
        stage,
        folder,
        world=here,
        recorder=recorder,
        state=state,
        validation=validation,
        grid=grid,
        writer=writer,
        evaluate=evaluate,
    )

    batch_size, parts = run.train.batch_size, run.train.accumulation
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.train.precision is Precision.bf16)
    with observer.progress:
        observer.begin(start)
        batches = training_batches(
            run, shards, start=clock.samples, batch_size=batch_size // parts, origin=stage.start, part=here.part
        )
        network.train()
        while not (stage.over(clock) or here.any(stop.requested)):
            began, before, progress, spent = time.perf_counter(), clock.samples, stage.progress(clock), 0.0
            observer.meter.begin(clock.steps + 1)
            for number, batch in enumerate(islice(batches, parts), start=1):
                x = examples.draw(batch, network)
                tap, target = alignment.tap(), alignment.target(batch.pixels, examples.grid(batch.pixels))
                with last_only(model, alignment, last=number == parts):
                    with bf16:
                        losses = objective.loss(
                            model, x.latents, noise=x.noise, timestep=x.timestep, condition=x.condition, route=x.route, tap=tap
                        )
                        apart = alignment.loss(tap, target)
                    total = losses if apart is None else losses + alignment.weight * apart
                    (total.sum() * here.size / batch_size).backward()  # gradients are means over processes
                spent += len(batch) * flops.per_sample(examples.grid(batch.pixels), x.condition.text.shape[1])
                observer.meter.losses(batch, losses, alignment=apart)
                observer.skipped(batch)
            if model is not network and has_parameters(alignment):
                here.average(p.grad for p in alignment.parameters() if p.grad is not None)
            rate = schedule.factor(step=clock.steps - stage.first_step + 1, progress=progress)
            set_rate(optimizer, rate)
            observer.meter.norm(clipped_step(optimizer, run.train.clip))
            clock.steps += 1
            clock.samples += batch_size
            state.averages.update(samples=clock.samples, fresh=batch_size)
            clock.spend(time.perf_counter() - began, devices=here.size)
            seconds, device_seconds, spent = here.summed([clock.seconds, clock.device_seconds, spent])
            clock.seconds, clock.device_seconds, clock.flops = seconds / here.size, device_seconds / here.size, clock.flops + spent
            observer.step(before, rate=rate)
        return observer.finish()


def _same_network(todo: list[Stage]) -> None:
    """Raise ConfigError for a stage that has other parameters than the first: found now, not after days."""
    shapes = [{name: p.shape for name, p in build(Architecture.of(s.run), seed=None).named_parameters()} for s in todo]
    for stage, own in zip(todo, shapes):
        if other := sorted(own.items() ^ shapes[0].items()):
            name, shape = other[0]
            has = "has" if name in own else "has no"
            raise ConfigError(
                f"stages.{stage.name}: {has} {name} {tuple(shape)}, which the first stage does not; set that for the whole run"
            )


def _samples(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


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
