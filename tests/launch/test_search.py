"""Searches over arms that are not trained: what they measure is written into their folders, in a closed form."""

import json
import math

import pytest

from hdm.launch.campaign import Campaign
from hdm.sweep import parse
from hdm.track.events import EventLog

FIXED = ("experiment=none", "model=nano", "text_encoder=hash", "autoencoder=pixel", "budget.steps=4", "track.uri=off")
RATE = "optimizer.lr=tag(log,interval(1e-4,1))"


def explorer(*arguments):
    sweep = parse([*FIXED, *arguments])
    sweep.folder.mkdir(parents=True, exist_ok=True)
    return Campaign(sweep).explorer


def measured(arm, **values):
    """The arm has finished with these values."""
    log = EventLog(arm.folder)
    log.metrics(values, None)
    log.close()
    (arm.folder / "result.json").write_text(json.dumps({"status": "finished", "samples": 4, "metrics": values}))


def loss(arm):
    return (math.log10(arm.run.optimizer.lr) + 2) ** 2 + (arm.run.backbone.zero_output is True)


def run(search, count):
    for _ in range(count):
        (arm,) = search.more()
        measured(arm, **{"val/loss": loss(arm), "cost/flops": arm.run.optimizer.lr})
        search.ended(arm, "finished")


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes", "nsgaii"])
def test_a_search_ends_and_goes_on_where_it_was(name):
    arguments = (RATE, "backbone.zero_output=true,false", f"search={name}", "trials=8")
    first = explorer(*arguments)
    run(first, 3)
    left = first.more()  # and the launcher dies
    again = explorer(*arguments)
    arms = again.begin()
    assert len({arm.folder for arm in arms}) == 4
    assert left[0].folder == arms[3].folder
    measured(left[0], **{"val/loss": 1.0, "cost/flops": 1.0})
    again.ended(arms[3], "finished")
    run(again, 4)
    assert again.more() is None
    trials = again.trials.mine()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 8
    assert name == "nsgaii" or len({t.params["optimizer.lr"] for t in trials}) == 8  # its children may repeat their parents
    assert {len(t.values) for t in trials} == {2 if name == "nsgaii" else 1}


def test_tpe_finds_the_hollow():
    search = explorer(RATE, "search=tpe", "trials=24")
    run(search, 24)
    best = min(search.trials.mine(), key=lambda t: t.value)
    assert (
        abs(math.log10(best.params["optimizer.lr"]) + 2) < 0.3
    )  # of an interval 4 wide, in which chance finds 0.6 four times in 24


def test_a_setting_is_worth_the_mean_over_its_seeds():
    search = explorer(RATE, "search=random", "trials=1", "seeds=2")
    arms = search.more()
    assert [arm.run.seed for arm in arms] == [0, 1]
    for arm, value in zip(arms, (1.0, 2.0)):
        measured(arm, **{"val/loss": value})
        search.ended(arm, "finished")
    assert [t.value for t in search.trials.mine()] == [1.5]


def test_an_axis_below_a_value_is_searched_there_alone(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text("routing: {tread: {rate: 'interval(0.1, 0.9)'}, none: {}}\n")
    search = explorer("sweep=mine", "search=random", "trials=6")
    arms = [arm for _ in range(6) for arm in search.more()]
    kinds = {arm.point["routing"]: ("routing.rate" in arm.point) for arm in arms}
    assert kinds == {"tread": True, "none": False}


def test_what_falls_behind_is_stopped():
    search = explorer(RATE, "search=random", "trials=6", "pruner=median")
    for number in range(5):
        (arm,) = search.more()
        log = EventLog(arm.folder)
        for samples in (8, 16, 24):
            log.metrics({"val/loss": 1.0 - 0.01 * number}, samples)
        assert not search.falls_behind(arm)
        measured(arm, **{"val/loss": 1.0})
        search.ended(arm, "finished")
    (arm,) = search.more()
    log = EventLog(arm.folder)
    log.metrics({"val/loss": 0.5}, 8)
    assert not search.falls_behind(arm)
    log.metrics({"val/loss": 3.0}, 16)
    log.metrics({"val/loss": 3.0}, 24)
    search.falls_behind(arm)
    assert search.trials.mine()[-1].intermediate_values == {1: 0.5, 2: 3.0, 3: 3.0}
    search.ended(arm, "pruned")
    assert search.trials.mine()[-1].state.name == "PRUNED"


def test_a_setting_that_cannot_run_costs_its_trial_and_nothing_else():
    search = explorer("crop.size=int(interval(32,64))", "search=random", "trials=9")
    found = [search.more() for _ in range(9)]
    assert search.more() is None
    assert all("crop.size" in problem for problem in search.problems)
    assert sum(arms == [] for arms in found) == len(search.problems) > 0
