import optuna
import pytest
import sqlalchemy

from hdm.config.errors import HdmError
from hdm.launch.study import Study, Trials, open_study
from hdm.track.uri import alone

AXES = {"merge": ["cross", "concat"], "seed": ["0", "1"]}


def study(folder, metric="val/loss"):
    return Study(folder, axes=AXES, metric=metric, direction="minimize")


def trials(folder, name="val/loss (minimize)"):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    return [(t.state.name, t.params, t.value) for t in optuna.load_study(study_name=name, storage=storage).trials]


def test_points_and_values_are_on_disk(tmp_path):
    first = study(tmp_path)
    first.tell({"merge": "cross", "seed": "0"}, 0.5)
    first.tell({"merge": "concat", "seed": "1"}, float("nan"))
    first.tell({"merge": "concat", "seed": "0"}, None)
    assert trials(tmp_path) == [
        ("COMPLETE", {"merge": "cross", "seed": "0"}, 0.5),
        ("FAIL", {"merge": "concat", "seed": "1"}, None),
        ("FAIL", {"merge": "concat", "seed": "0"}, None),
    ]


def test_a_launcher_that_comes_back_doubles_nothing(tmp_path):
    point = {"merge": "cross", "seed": "0"}
    study(tmp_path).tell(point, 0.5)  # and died
    study(tmp_path).tell(point, 0.5)
    assert trials(tmp_path) == [("COMPLETE", point, 0.5)]


def test_values_may_be_listed_in_another_order(tmp_path):
    study(tmp_path).tell({"merge": "cross", "seed": "0"}, 0.5)
    other = Study(tmp_path, axes={k: v[::-1] for k, v in AXES.items()}, metric="val/loss", direction="minimize")
    other.tell({"merge": "concat", "seed": "0"}, 0.25)
    assert len(other.values()) == 2


def test_a_failed_point_is_tried_again(tmp_path):
    point = {"merge": "cross", "seed": "0"}
    study(tmp_path).tell(point, None)
    study(tmp_path).tell(point, 0.25)
    assert [state for state, *_ in trials(tmp_path)] == ["FAIL", "COMPLETE"]
    assert study(tmp_path).values() == {(("merge", "cross"), ("seed", "0")): 0.25}


def test_another_metric_is_another_study(tmp_path):
    point = {"merge": "cross", "seed": "0"}
    study(tmp_path).tell(point, 0.5)
    study(tmp_path, "fid").tell(point, 40.0)
    assert study(tmp_path).values() != study(tmp_path, "fid").values()


def shared(folder, owner, limit=2):
    found = open_study(folder, storage=f"sqlite:///{folder}/study.db", name="many", directions=["minimize"], heartbeat=1)
    return Trials(found, owner=owner, limit=limit)


def silence(folder):
    """All signs of life are as old as can be."""
    engine = sqlalchemy.create_engine(f"sqlite:///{folder}/study.db")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("update trial_heartbeats set heartbeat = '2000-01-01 00:00:00'"))


def test_a_silent_launchers_setting_goes_to_another_once(tmp_path):
    here, there, third = (shared(tmp_path, name) for name in ("here", "there", "third"))
    lost = here.ask()
    x = lost.suggest_float("x", -1, 1)
    other = there.ask()
    assert there.ask() is None and there.others
    there.beat([other])
    silence(tmp_path)
    there._record_beat(other)
    (again,) = [found for launcher in (third, shared(tmp_path, "fourth")) if (found := launcher.ask())]
    assert again.suggest_float("x", -1, 1) == x
    assert here.mine() == []
    here.tell(lost.number, [0.25])  # too late, and no harm
    third.tell(again.number, [x * x])
    there.tell(other.number, [1.0])
    trials = third.study.trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert shared(tmp_path, "fifth").ask() is None
    assert shared(tmp_path, "fifth", limit=3).ask().number == 3


def test_a_setting_that_silences_its_launchers_is_given_up(tmp_path):
    for _ in range(4):
        assert shared(tmp_path, "one", limit=1).ask() is not None
        silence(tmp_path)
    assert shared(tmp_path, "one", limit=1).ask() is None


def test_what_failed_by_itself_counts_and_is_not_tried_again(tmp_path):
    trials = shared(tmp_path, "here", limit=1)
    trials.tell(trials.ask().number, None)
    assert shared(tmp_path, "there", limit=1).ask() is None
    assert [t.number for t in trials.mine()] == [0]


def test_a_grid_has_one_launcher_wherever_it_is(tmp_path):
    uri = f"sqlite:///{tmp_path}/study.db"
    with alone(uri, task="merge-1", busy="taken"):
        with alone(uri), alone(uri, task="merge-2", busy="taken"):
            pass
        with pytest.raises(HdmError, match="taken"), alone(uri, task="merge-1", busy="taken"):
            pass
    with alone(uri, task="merge-1", busy="taken"):
        pass
