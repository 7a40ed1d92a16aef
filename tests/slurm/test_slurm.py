"""Sweeps on a real Slurm with accounting: arrays, failures, preemption, a dead launcher, an arm over two nodes."""

import pytest
import torch
from on_slurm import finish, folder_of, jobs_of, reason_of, seen, start, wait_until
from safetensors.torch import load_file
from tiny_run import TINY

from hdm.config.compose import compose
from hdm.run import execute
from hdm.track.events import read, series

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def weights(folder):
    return load_file(max(folder.glob("checkpoints/samples-*")) / "model.safetensors")


def test_a_dead_launcher_a_failure_and_a_preemption_change_no_bit(accounted, shards, tmp_path):
    """One arm fails and one is preempted while nobody watches; the next launcher finds both jobs again."""
    arguments = ["budget.samples=400", "train.checkpoint_every=20", "optimizer.lr=1e-3,1e30", "retry_failed=false"]
    bad, good = "optimizer.lr=1e+30", "optimizer.lr=0.001"
    process = start(accounted, *arguments)
    folder = tmp_path / folder_of(*arguments[:2], "optimizer.lr=1e-3")
    wait_until(lambda: seen(folder, 40), process)
    process.kill()
    process.communicate()
    jobs = jobs_of(tmp_path)
    accounted.ask("srun", "--partition=prio", "--nodes=2", "--exclusive", "true")
    again = start(accounted, *arguments)
    single = execute(compose([*TINY, *arguments[:2], "optimizer.lr=1e-3", "out=single", "track.uri=off"]))
    code, output = finish(again)
    assert code == 1, output
    assert "loss is nan" in (tmp_path / reason_of(bad, output).split("log: ")[1].rstrip(")")).read_text()
    assert accounted.restarts(jobs[good]) == 1
    array = jobs[good].split("_")[0]
    started = accounted.ask("sacct", "-n", "-X", "-o", "JobID,Partition").split("\n")
    assert sorted(line.split()[0] for line in started if " ci" in line) == [
        f"{array}_0",
        f"{array}_1",
    ]  # one array, and nothing later

    assert [event.data["status"] for event in read(folder) if event.type == "status"].count("running") == 2
    mine, theirs = weights(folder), weights(single.folder)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert series(read(folder), "train/loss") == series(read(single.folder), "train/loss")


def test_an_arm_trains_on_two_nodes_what_one_process_trains(accounted, shards, tmp_path):
    process = start(accounted, "seeds=1", "launcher.nodes=2")
    single = execute(compose([*TINY, "out=single", "track.uri=off"]))
    wait_until(lambda: jobs_of(tmp_path), process)
    job = jobs_of(tmp_path)["seed=0"]
    code, output = finish(process)
    assert code == 0, output
    (line,) = accounted.ask("sacct", "-n", "-X", "-P", "-j", job, "-o", "NNodes,State").split()
    assert line == "2|COMPLETED"
    folder = tmp_path / folder_of()
    mine, theirs = weights(folder), weights(single.folder)
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert (mine[key] - theirs[key]).abs().max() <= 2e-3 * theirs[key].abs().max().clamp(min=1e-3), key
    for key in ("train/loss", "val/loss"):
        (mine, theirs) = (dict(series(read(where), key)) for where in (folder, single.folder))
        assert mine == pytest.approx(theirs, rel=1e-3)
