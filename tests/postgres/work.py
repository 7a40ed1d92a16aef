"""One of eight processes that share a study and a tracking server: trials of milliseconds, recorded in a run of its own."""

import sys
import time
from functools import partial
from pathlib import Path

import optuna

from hdm.launch.study import Trials, open_study, patiently
from hdm.track.events import EventLog
from hdm.track.mlflow import Shipper

EVERY = 25


def work(folder: Path, uri: str, number: int) -> None:
    folder = folder / f"worker{number}"
    log = EventLog(folder)
    log.params({"worker": number, "track.experiment": "many"})
    with Shipper(folder, uri=f"{uri}/mlflow", experiment="many", interval=0.5):
        sampler = optuna.samplers.RandomSampler(seed=number)
        study = open_study(folder, storage=f"{uri}/optuna", name="many", directions=["minimize"], sampler=sampler)
        trials = Trials(study, owner=str(number), limit=10**6)
        for _ in range(EVERY):
            trial = trials.ask()
            assert trial is not None
            x = patiently(partial(trial.suggest_float, "x", -1, 1))
            trials.beat([trial])
            trials.tell(trial.number, [x * x])
            log.metrics({"value": x * x}, trial.number)
            time.sleep(0.05)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
