"""Many writers on one PostgreSQL that goes away in between: no trial and no number is lost, doubled or stuck."""

import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from hdm.config.lines import REPOSITORY
from hdm.track.replay import sync

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

WORKERS, EVERY = 8, 25


def test_eight_workers_and_a_server_that_restarts(database, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "work.py"), str(tmp_path), database.uri]
    workers = [  # on databases that nobody has opened before
        subprocess.Popen([*command, str(n)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for n in range(WORKERS)
    ]
    deadline = time.monotonic() + 300
    while told(database) < WORKERS * EVERY // 3:
        assert time.monotonic() < deadline
        assert all(worker.poll() in (None, 0) for worker in workers), [w.communicate()[0] for w in workers if w.poll()]
        time.sleep(0.5)
    assert told(database) < WORKERS * EVERY  # in the middle
    database.down("keep")
    time.sleep(2)
    database.up()
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output

    study = optuna.load_study(study_name="many", storage=f"{database.uri}/optuna")
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == WORKERS * EVERY
    assert sorted(t.user_attrs["owner"] for t in complete) == sorted(str(n) for n in range(WORKERS) for _ in range(EVERY))
    # a trial that the server made without answering has no owner; it is failed or will be, and is no one's
    assert all("owner" not in t.user_attrs for t in study.trials if t.state.name != "COMPLETE")

    client = MlflowClient(f"{database.uri}/mlflow")
    for number in range(WORKERS):
        sync(tmp_path / f"worker{number}", uri=f"{database.uri}/mlflow")  # what was left when the workers ended
    runs = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert sorted(run.data.params["worker"] for run in runs) == [str(n) for n in range(WORKERS)]
    sent = {m.step: m.value for run in runs for m in client.get_metric_history(run.info.run_id, "value")}
    assert sent == {t.number: t.value for t in complete}
    assert sum(len(client.get_metric_history(run.info.run_id, "value")) for run in runs) == WORKERS * EVERY


def told(database) -> int:
    """Trials that are complete, asked without optuna, which would make the tables."""
    query = ["psql", "-h", "127.0.0.1", "-p", "15433", "-U", "hdm", "-d", "optuna", "-Atqc"]
    answer = subprocess.run([*query, "select count(*) from trials where state = 'COMPLETE'"], capture_output=True, text=True)
    return int(answer.stdout or 0)
