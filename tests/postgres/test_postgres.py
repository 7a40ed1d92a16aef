"""Many writers on one PostgreSQL that goes away in between: no trial and no number is lost, doubled or stuck."""

import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from tiny_run import TINY, write_shards
from work import WORKERS

from hdm.config.errors import HdmError
from hdm.config.lines import REPOSITORY
from hdm.track.replay import sync
from hdm.track.uri import alone

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.mark.parametrize("each", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_workers_and_a_server_that_restarts(database, tmp_path, each):
    count = WORKERS * each
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "work.py"), str(tmp_path), database.uri, str(count)]
    workers = subprocess.Popen(  # on databases that nobody has opened before
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while told(database) < count // 3:
        assert time.monotonic() < deadline
        assert workers.poll() is None, workers.communicate()[0]
        time.sleep(0.5)
    assert told(database) < count  # in the middle
    database.down("keep")
    time.sleep(2)
    database.up()
    output, _ = workers.communicate(timeout=300)
    assert workers.returncode == 0, output

    study = optuna.load_study(study_name="many", storage=f"{database.uri}/optuna")
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == count
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


def test_two_launchers_of_one_search_and_one_is_killed(database, tmp_path):
    """The trial that it leaves behind is noticed by the other and run again, and no arm runs twice."""
    grid = partial(alone, f"{database.uri}/optuna", busy="taken")  # which has one launcher
    with grid(task="merge-1"), grid(task="merge-2"), pytest.raises(HdmError, match="taken"), grid(task="merge-1"):
        pass
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write_shards(folder)
    search = ["optimizer.lr=interval(1e-4,1e-2)", "search=random", "trials=3", "heartbeat=1"]
    command = [sys.executable, "-m", "hdm.sweep", *TINY, *search, f"storage={database.uri}/optuna", "track.uri=off"]

    def start(folder):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def trials():
        (summary,) = optuna.get_all_study_summaries(storage)
        return optuna.load_study(study_name=summary.study_name, storage=storage).trials

    first, second = start(here), start(there)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("*/runs/run-*/config.json"))) < 2:  # each has an arm at work
        assert time.monotonic() < deadline and first.poll() is second.poll() is None, first.communicate() + second.communicate()
        time.sleep(0.2)
    first.kill()
    for arm in psutil.process_iter(["cmdline"]):
        if any(str(here) in word for word in arm.info["cmdline"] or []):
            arm.kill()
    first.communicate()
    storage = optuna.storages.RDBStorage(f"{database.uri}/optuna")
    while not any(t.state.name == "FAIL" for t in trials()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (lost,) = (t for t in trials() if t.state.name == "FAIL")
    assert lost.user_attrs["owner"].endswith(str(here / "runs" / "sweeps" / Path(lost.user_attrs["owner"]).name))
    again = start(here)
    for launcher in (again, second):
        output, _ = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, output
    complete = [t for t in trials() if t.state.name == "COMPLETE"]
    assert len(trials()) == 4
    assert len({t.params["optimizer.lr"] for t in complete}) == len(complete) == 3
    assert lost.params in [t.params for t in complete]
    results = [path.parent.name for path in tmp_path.glob("*/runs/run-*/result.json")]
    assert len(results) == len(set(results)) == 3


def told(database) -> int:
    """Trials that are complete, asked without optuna, which would make the tables."""
    query = ["psql", "-h", "127.0.0.1", "-p", "15433", "-U", "hdm", "-d", "optuna", "-Atqc"]
    answer = subprocess.run([*query, "select count(*) from trials where state = 'COMPLETE'"], capture_output=True, text=True)
    return int(answer.stdout or 0)
