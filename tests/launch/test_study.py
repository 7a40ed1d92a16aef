import optuna

from hdm.launch.study import Study

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
