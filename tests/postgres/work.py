"""Eight processes that share a study and a tracking server: trials of milliseconds, each process with a run of its own.

usage: work.py FOLDER URI TRIALS
"""

import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  imported once for all
import optuna

from hdm.launch.study import Trials, open_study, patiently
from hdm.track.events import EventLog
from hdm.track.mlflow import Shipper

WORKERS = 8


def work(folder: Path, uri: str, number: int, limit: int) -> None:
    folder = folder / f"worker{number}"
    log = EventLog(folder)
    log.params({"worker": number, "track.experiment": "many"})
    with Shipper(folder, uri=f"{uri}/mlflow", experiment="many", interval=0.5):
        sampler = optuna.samplers.RandomSampler(seed=number)
        more = {"directions": ["minimize"], "sampler": sampler, "heartbeat": 6}
        trials = Trials(open_study(folder, storage=f"{uri}/optuna", name="many", **more), owner=str(number), limit=limit)
        while (trial := trials.ask()) is not None or trials.others:
            if trial is None:
                time.sleep(0.5)
                continue
            x = patiently(partial(trial.suggest_float, "x", -1, 1))
            trials.beat([trial])
            trials.tell(trial.number, [x * x])
            log.metrics({"value": x * x}, trial.number)


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    given = Path(sys.argv[1]), sys.argv[2]
    workers = [fork.Process(target=work, args=(*given, number, int(sys.argv[3]))) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(f"exit codes {codes}" if any(codes := [worker.exitcode for worker in workers]) else 0)
