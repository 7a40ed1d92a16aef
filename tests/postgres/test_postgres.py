"""Many writers on one PostgreSQL that goes away in between: no trial and no number is lost, doubled or stuck."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from work import WORKERS

from hdm.config.lines import REPOSITORY
from hdm.track.replay import sync

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

TRIALS = WORKERS * 200


def test_eight_workers_and_a_server_that_restarts(database, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "work.py"), str(tmp_path), database.uri, str(TRIALS)]
    workers = subprocess.Popen(  # on databases that nobody has opened before
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while told(database) < TRIALS // 3:
        assert time.monotonic() < deadline
        assert workers.poll() is None, workers.communicate()[0]
        time.sleep(0.5)
    assert told(database) < TRIALS  # in the middle
    database.down("keep")
    time.sleep(2)
    database.up()
    output, _ = workers.communicate(timeout=300)
    assert workers.returncode == 0, output

    study = optuna.load_study(study_name="many", storage=f"{database.uri}/optuna")
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == TRIALS
    others = [t for t in study.trials if t.state.name != "COMPLETE"]  # what the server began without answering
    assert {t.state.name for t in others} <= {"FAIL"}
    owners = Counter(t.user_attrs["owner"] for t in complete)
    assert sorted(owners) == [str(n) for n in range(WORKERS)]

    client = MlflowClient(f"{database.uri}/mlflow")
    for number in range(WORKERS):
        sync(tmp_path / f"worker{number}", uri=f"{database.uri}/mlflow")  # what was left when the workers ended
    runs = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert sorted(run.data.params["worker"] for run in runs) == sorted(owners)
    sent = [(m.step, m.value) for run in runs for m in client.get_metric_history(run.info.run_id, "value")]
    assert sorted(sent) == sorted((t.number, t.value) for t in complete)


def told(database) -> int:
    """Trials that are complete, asked without optuna, which would make the tables."""
    query = ["psql", "-h", "127.0.0.1", "-p", "15433", "-U", "hdm", "-d", "optuna", "-Atqc"]
    answer = subprocess.run([*query, "select count(*) from trials where state = 'COMPLETE'"], capture_output=True, text=True)
    return int(answer.stdout or 0)
