import pytest

from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.identity import run_name
from hdm.launch.arm import adopted, compose_arms, mark, sort_keys, sweep_name
from hdm.sweep import parse
from hdm.track.events import EventLog, read


def test_one_arm_for_every_combination():
    sweep = parse(["merge=cross,concat", "routing.rate=0.25,0.5", "seeds=2", "model=nano"])
    assert len(sweep.arms) == 8
    assert sweep.arms[0].label == "merge=cross routing.rate=0.25 seed=0"
    assert {arm.setting for arm in sweep.arms} == {f"merge={m} routing.rate={r}" for m in ("cross", "concat") for r in (0.25, 0.5)}
    assert all(arm.run.model.size == "nano" for arm in sweep.arms)


def test_an_arm_is_the_run_that_the_same_overrides_name():
    """So that a run which is there already is an arm that is finished already."""
    arm = parse(["merge=cross,concat"]).arms[1]
    run = compose(["experiment=openmoji_nano", "merge=concat"])
    assert arm.folder.name == run_name(run)
    assert run_name(compose(adopted(arm, "merge-12345678"), default_experiment="openmoji_nano")) == arm.folder.name


def test_adopted_arms_carry_their_parent_and_a_name():
    arm = parse(["merge=cross,concat", "optimizer.lr=1e-3,2e-3"]).arms[3]
    run = compose(adopted(arm, "merge-12345678"), default_experiment="openmoji_nano")
    assert (run.track.parent, run.track.name) == ("sweeps/merge-12345678", "merge=concat optimizer.lr=0.002")


def test_sweep_name_depends_on_the_arms_and_not_on_their_order():
    names = {
        sweep_name(parse(arguments).arms)
        for arguments in (
            ["merge=cross,concat"],
            ["merge=concat,cross"],
            ["merge=cross,concat", "metric=fid", "parallel=3", "train.workers=0"],
        )
    }
    assert len(names) == 1
    assert next(iter(names)).startswith("merge-")
    assert sweep_name(parse(["merge=cross,gated"]).arms) not in names
    assert sweep_name(parse(["merge=cross,concat", "seed=1"]).arms) not in names


def test_what_is_set_once_holds_for_every_arm_that_has_it():
    fixed = ["text_encoder.max_length=7", "routing.rate=0.75"]
    arms = parse(["text_encoder=hash,minilm", "routing=tread,none", *fixed]).arms
    assert {arm.run.text_encoder.max_length for arm in arms} == {7}
    assert [getattr(arm.run.routing, "rate", None) for arm in arms] == [0.75, 0.75, None, None]
    with pytest.raises(ConfigError, match="has no field 'rat'"):
        parse(["routing=tread,none", "routing.rat=0.5"])


def test_the_seed_varies_last():
    assert list(sort_keys({"seed": ["0"], "optimizer.lr": ["1"], "routing": ["none"], "merge": ["add"]})) == [
        "merge", "routing", "optimizer.lr", "seed",
    ]  # fmt: skip


def test_glob_takes_every_variant():
    from hdm.config.axes import MERGE

    assert [arm.point["merge"] for arm in parse(["merge=glob(*)"]).arms] == MERGE.names()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge=cross"], "nothing to compare"),
        ([], "nothing to compare"),
        (["merge=cross,conact"], "arm merge=conact: merge=conact: no such variant; did you mean 'concat'"),
        (
            ["experiment=none", "model=nano", "merge=cross,concat", "model.heads=3"],
            "model.dim=64: is not model.heads x model.head_dim",
        ),
        (["experiment=none", "model=nano", "model.heads=2,3"], "arm model.heads=3: model.dim=64"),
        (["mrege=cross,concat"], "no such key 'mrege'; did you mean 'merge'"),
        (["train.workers=0,1"], "compute the same thing"),
        (["merge=cross,concat", "seeds=0"], "seeds=0: expected a whole number above 0"),
        (["merge=cross,concat", "parallel=two"], "parallel=two: expected a whole number"),
        (["merge=cross,concat", "seeds=2", "seed=4"], "stands beside seed="),
        (["merge=cross,concat", "direction=maximise"], "did you mean 'maximize'"),
        (["merge=cross,concat", "launcher=cloud"], "no such launcher"),
        (["merge=cross,concat", "resume=never"], "resume=never: a sweep continues its arms"),
        (["merge=cross,cross"], "a value stands twice"),
        (["optimizer.lr=interval(0,1)"], "an interval has no list of values"),
        (["sweep=mrege"], "no such file sweeps/mrege.yaml"),
        (["experiment=openmoji_nanno", "merge=cross,concat"], "did you mean 'openmoji_nano'"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(arguments, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_sweep_files_are_the_same_lines(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        "merge: [cross, concat]\nrouting.rate: [0.25, 0.5]\nseeds: 2\nmetric: fid\nname: my run\n"
    )
    sweep = parse(["sweep=mine", "seeds=1"])
    assert (len(sweep.arms), sweep.options.metric) == (4, "fid")
    assert sweep.arms[0].run.name == "my run"
    (tmp_path / "sweeps" / "mine.yaml").write_text("- merge\n")
    with pytest.raises(ConfigError, match="holds a list"):
        parse(["sweep=mine"])


def test_a_run_is_marked_once(tmp_path):
    EventLog(tmp_path)
    for _ in range(2):
        mark(tmp_path, "merge-1")
    mark(tmp_path, "merge-2")
    assert [e.data["values"] for e in read(tmp_path) if e.type == "tags"] == [
        {"hdm.sweep.merge-1": "arm"},
        {"hdm.sweep.merge-2": "arm"},
    ]


def test_arms_of_plugins_are_known(tmp_path, monkeypatch):
    (tmp_path / "my_merges.py").write_text(
        "from dataclasses import dataclass\n"
        "from hdm.config.axes import MERGE\n\n"
        "@dataclass(kw_only=True, slots=True)\n"
        "class HalfConfig:\n    '''x + s/2.'''\n\n"
        "@MERGE.register('half', HalfConfig)\n"
        "class Half: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from hdm.config.axes import MERGE

    try:
        assert [arm.point["merge"] for arm in parse(["merge=cross,half", "plugins=[my_merges]"]).arms] == ["cross", "half"]
    finally:
        MERGE.variants.pop("half", None)


def test_compose_arms_without_axes_is_the_run_itself():
    (arm,) = compose_arms(["merge=concat"], {})
    assert arm.label == "baseline"
