"""Time and memory of a report over many arms, read from a database.

usage: python -m benchmarks.report [arms=1000] [seeds=10]

The arms are synthetic runs in SQLite with the parameters of a real configuration, ten metrics, a curve of ten validations, and, for
the first settings, sample grids of 16 pictures. Seconds are those of the CPU.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient

from hdm import cli
from hdm.config.compose import compose, flatten
from hdm.pictures import sheet
from hdm.report.build import collect, write
from hdm.report.gallery import CAPTIONS, MOST_SETTINGS
from hdm.report.store import Store
from hdm.track.uri import connect, experiment_id

NAME = "rates-0badcafe"
STEPS = range(0, 28_801, 3200)


def record(uri: str, arms: int, seeds: int) -> None:
    """Make the sweep's run and the runs of its arms."""
    from mlflow.entities import Metric, Param, RunTag

    client = connect(uri)
    experiment = experiment_id(client, "lab", uri)
    settings = [f"optimizer.lr={0.1 + 0.001 * number:.3f}" for number in range(arms // seeds)]
    entries = [
        {"label": f"{setting} seed={seed}", "setting": setting, "seed": seed, "run": f"run-s{seed}-{number:08x}", "overrides": []}
        for number, setting in enumerate(settings)
        for seed in range(seeds)
    ]
    record = {
        "format": 1, "name": NAME, "command": "", "axes": {"optimizer.lr": [s.partition("=")[2] for s in settings]}, "fixed": [],
        "seeds": list(range(seeds)), "budget": {"samples": 28800}, "metric": "val/loss", "direction": "minimize", "arms": entries,
    }  # fmt: skip
    parent = client.create_run(experiment, tags={f"hdm.sweep.{NAME}": "sweep", "hdm.run_id": f"{NAME}/0"}, run_name=NAME)
    client.log_dict(parent.info.run_id, record, "sweep.json")
    config = {key: str(value)[:500] or "''" for key, value in flatten(compose(["experiment=openmoji_nano"])).items()}
    noise = np.random.default_rng(0)
    now = int(time.time() * 1000)
    for number, entry in enumerate(entries):
        tags = {f"hdm.sweep.{NAME}": "arm", "hdm.run_id": f"{entry['run']}/0", "mlflow.parentRunId": parent.info.run_id}
        run = client.create_run(experiment, tags=tags, run_name=entry["label"])
        own = config | {"seed": str(entry["seed"]), "optimizer.lr": entry["setting"].partition("=")[2]}
        loss = 0.3 + 1e-4 * (number // seeds) + float(noise.normal(0, 0.002))
        metrics = [Metric("val/loss", loss + 1 / (1 + step), now, step) for step in STEPS]
        metrics += [Metric(f"other/metric{n}", loss + n, now, 0) for n in range(6)]
        metrics += [Metric(key, v, now, 0) for key, v in (("cost/seconds", 600.0), ("cost/flops", 1e14), ("model/parameters", 1e6))]
        params = [Param(key, value) for key, value in own.items()]
        for first in range(0, len(params), 100):
            last = first + 100 >= len(params)
            client.log_batch(run.info.run_id, params=params[first : first + 100], metrics=metrics if last else [])
        if number // seeds < MOST_SETTINGS:
            draw(client, run.info.run_id, noise)
        client.log_batch(run.info.run_id, tags=[RunTag("hdm.shipped", "9")])
        client.set_terminated(run.info.run_id, status="FINISHED")


def draw(client: MlflowClient, run_id: str, noise: np.random.Generator) -> None:
    """A sample grid of 16 pictures of noise, and its captions."""
    pixels = torch.from_numpy(noise.integers(0, 255, (16, 3, 32, 32), dtype=np.uint8))
    client.log_image(run_id, sheet(pixels, [f"caption {n}" for n in range(16)]), key="samples/grid", step=28800, synchronous=True)
    client.log_text(run_id, json.dumps([f"caption {n}" for n in range(16)]), CAPTIONS)


def command(arguments: list[str]) -> None:
    """Record, report, print."""
    arms, seeds = (int(cli.take_option(arguments, key) or n) for key, n in (("arms", 1000), ("seeds", 10)))
    cli.reject_unknown(arguments, "options: arms=, seeds=")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        uri = f"sqlite:///{folder}/mlflow.db"
        if not os.fork():  # so that what recording takes is not in the peak of memory
            record(uri, arms, seeds)
            sys.stdout.flush()
            os._exit(0)
        if os.wait()[1]:
            raise SystemExit("the recording failed")
        began = time.process_time()
        report = collect(Store(uri), NAME)
        read = time.process_time() - began
        paths = write(report, Path("report"))
        written = time.process_time() - began - read
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{arms} arms: read and tested in {read:.1f} s, drawn and written in {written:.1f} s, {memory:.0f} MB at most")
        print(f"{paths[0].name} has {paths[0].stat().st_size / 1e6:.1f} MB")
        os.chdir("/")


if __name__ == "__main__":
    cli.main(command, __doc__)
