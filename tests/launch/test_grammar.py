"""What sweep files and the command line mean."""

import json

import pytest

from hdm.config.errors import ConfigError
from hdm.config.lines import REPOSITORY
from hdm.launch import record
from hdm.launch.grammar import intervals, points, said, sweep_files, values_of
from hdm.launch.options import SweepOptions
from hdm.plan import plan
from hdm.stats import least_seeds
from hdm.sweep import parse


def write(tmp_path, text, name="mine"):
    (tmp_path / "sweeps").mkdir(exist_ok=True)
    (tmp_path / "sweeps" / f"{name}.yaml").write_text(text)


def settings(statement):
    return [point.label for point in points(statement.axes.values())]


def test_a_value_may_bring_axes_along(tmp_path):
    write(tmp_path, "merge: {cross: {pairing: [mirror, deepest], norm: [rms, layer]}, concat: {}, add: {routing.rate: 0.25}}")
    statement = said(["sweep=mine"])
    assert settings(statement) == [
        {"merge": "cross", "merge.pairing": pairing, "norm": norm} for pairing in ("mirror", "deepest") for norm in ("rms", "layer")
    ] + [{"merge": "concat"}, {"merge": "add"}]
    assert [point.lines for point in points(statement.axes.values())][-1] == {"merge": "add", "routing.rate": "0.25"}
    assert values_of(statement.axes.values()) == {
        "merge": ["cross", "concat", "add"], "merge.pairing": ["mirror", "deepest"], "norm": ["rms", "layer"],
    }  # fmt: skip


def test_a_bundle_moves_several_keys_at_once(tmp_path):
    write(
        tmp_path,
        "bundles:\n  width:\n    64: {model.dim: 64, model.heads: 2, optimizer.lr: [0.1, 0.2]}\n"
        "    128: {model: {dim: 128, heads: 4}}\n",
    )
    assert [point.lines for point in points(said(["sweep=mine"]).axes.values())] == [
        {"model.dim": "64", "model.heads": "2", "optimizer.lr": "0.1"},
        {"model.dim": "64", "model.heads": "2", "optimizer.lr": "0.2"},
        {"model.dim": "128", "model.heads": "4"},
    ]
    assert settings(said(["sweep=mine", "width=128"])) == [{"width": "128"}]
    with pytest.raises(ConfigError, match=r"width=12: no such value; did you mean '128'"):
        said(["sweep=mine", "width=12"])


def test_bundles_make_arms(tmp_path):
    write(
        tmp_path,
        "experiment: openmoji_nano\nbundles:\n  width:\n    64: {model.dim: 64, model.heads: 2}\n"
        "    128: {model.dim: 128, model.heads: 4}\n",
    )
    arms = parse(["sweep=mine"]).arms
    assert [(arm.label, arm.run.model.dim, arm.run.model.heads) for arm in arms] == [("width=64", 64, 2), ("width=128", 128, 4)]


def test_the_command_line_overrules_the_file(tmp_path):
    write(tmp_path, "experiment: openmoji_nano\nmerge: [cross, concat]\nmodel.dim: 128\nseeds: 4\nmetric: fid\n")
    statement = said(["sweep=mine", "merge=add", "model.dim=64", "seeds=2"])
    assert statement.axes == {}
    assert [text for text in statement.fixed if text.startswith(("merge", "model"))] == ["merge=add", "model.dim=64"]
    assert SweepOptions.read(statement.options).seeds == 2
    assert settings(said(["sweep=mine", "merge=add,gated"])) == [{"merge": "add"}, {"merge": "gated"}]
    assert settings(said(["sweep=mine", "model.dim=64,128"]))[0] == {"merge": "cross", "model.dim": "64"}


def test_expressions_of_the_command_line_stand_in_files_too(tmp_path):
    write(tmp_path, "merge: glob(c*)\nmodel.depth: range(1,4)\noptimizer.lr: tag(log, interval(1e-4, 1e-2))\nroutine: none\n")
    statement = said(["sweep=mine"])
    assert values_of(statement.axes.values()) == {
        "merge": ["cross", "concat"], "model.depth": ["1", "2", "3"], "optimizer.lr": ["tag(log,interval(0.0001,0.01))"],
    }  # fmt: skip
    (axis,) = intervals(statement.axes.values())
    assert (axis.interval.low, axis.interval.high, axis.interval.log, axis.interval.integer) == (1e-4, 1e-2, True, False)


def test_an_experiment_in_mlflow_for_every_file(tmp_path):
    write(tmp_path, "experiment: openmoji_nano\nmerge: [cross, concat]\n")
    sweep = parse(["sweep=mine"])
    assert sweep.run.track.experiment == "mine"
    assert sweep.name.startswith("mine-")
    assert parse(["sweep=mine", "track.experiment=ours"]).run.track.experiment == "ours"


def test_sweep_json_holds_what_a_report_needs(tmp_path):
    write(tmp_path, "experiment: openmoji_nano\nmerge: {cross: {pairing: [mirror, deepest]}, concat: {}}\nbaseline: merge=concat\n")
    sweep = parse(["sweep=mine", "seeds=2", "direction=maximize", "metric=fid", "alpha=0.01"])
    sweep.folder.mkdir(parents=True)
    content = json.loads(record.write(sweep).read_text())
    assert content["format"] == 1
    assert content["axes"] == {"merge": ["cross", "concat"], "merge.pairing": ["mirror", "deepest"]}
    assert (content["seeds"], content["budget"], content["baseline"]) == ([0, 1], {"steps": 450}, "merge=concat")
    assert (content["metric"], content["direction"], content["alpha"]) == ("fid", "maximize", 0.01)
    assert (content["sampler"], content["pruner"], content["confirmatory"], content["noise_floor"]) == ("grid", None, True, None)
    assert len(content["arms"]) == 6
    assert content["arms"][3] == {
        "label": "merge=cross merge.pairing=deepest seed=1", "setting": "merge=cross merge.pairing=deepest", "seed": 1,
        "run": sweep.arms[3].folder.name, "overrides": sweep.arms[3].overrides,
    }  # fmt: skip
    assert {"merge=cross", "merge.pairing=deepest", "seed=1", "experiment=openmoji_nano"} <= set(content["arms"][3]["overrides"])


def test_arms_get_as_much_as_the_baseline():
    steps = parse(["merge=cross,concat", "train.batch_size=32,64", "iso=samples"])
    assert {arm.run.budget.samples for arm in steps.arms} == {450 * 32}
    assert {arm.run.budget.steps for arm in steps.arms} == {None}
    assert record.budget(steps) == {"samples": 450 * 32, "iso": "samples"}
    flops = parse(["merge=cross,concat", "iso=flops", "baseline=merge=concat"])
    stage = plan(parse(["merge=cross,concat"]).arms[1].run).stages[0]
    assert {arm.run.budget.flops for arm in flops.arms} == {float(stage.samples * stage.train)}
    same = parse(["merge=cross,concat", "iso=parameters"])
    sizes = [plan(arm.run).total_parameters for arm in same.arms]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02  # both are within 1 % of XUT's


def test_the_noise_floor_is_the_sweep_of_what_all_arms_share(tmp_path):
    write(tmp_path, "experiment: openmoji_nano\nseeds: 3\n", name="aa")
    write(tmp_path, "experiment: openmoji_nano\nmerge: [cross, concat]\nnoise_floor: aa\ntrain.batch_size: 32\n")
    assert parse(["sweep=mine"]).options.noise_floor == parse(["sweep=aa", "train.batch_size=32"]).name
    assert parse(["sweep=mine", "noise_floor=aa-12345678"]).options.noise_floor == "aa-12345678"


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml")))
def test_every_sweep_that_comes_along_composes_and_can_find_something(name):
    sweep = parse([f"sweep={name}"])
    assert len(sweep.arms) > 1
    if sweep.options.baseline:
        settings = len({arm.setting for arm in sweep.arms})
        assert len(sweep.arms) / settings >= least_seeds(comparisons=settings - 1)
    assert (REPOSITORY / "sweeps" / f"{name}.yaml").read_text().startswith("# ")


def test_the_sweeps_of_the_laboratory_are_there():
    assert set(sweep_files()) >= {
        "merge", "merge_ablation", "adaln", "tread_rate", "position", "crop", "text_fusion", "attention", "backbone",
        "recipe_leave_one_out", "aa_noise_floor",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge=cross,concat", "pruner=median"], "pruner=median: a table of a whole grid keeps every arm"),
        (["merge=cross,concat", "search=tpe"], "search=tpe: needs an end; say how many settings to try, such as trials=32"),
        (["merge=cross,concat", "trials=4"], "trials=4: a grid tries every combination"),
        (["merge=cross,concat", "search=tpe", "trials=4", "confirmatory=true"], "confirmatory=true: search=tpe goes by"),
        (["merge=cross,concat", "search=tpe", "trials=4", "pruner=median", "seeds=2"], "seeds=2 makes several"),
        (["merge=cross,concat", "search=nsgaii", "trials=4", "pruner=median"], "nsgaii has two"),
        (["merge=cross,concat", "search=cmaes", "trials=4"], "search=cmaes: works on numbers"),
        (["merge=cross,concat", "search=tpe", "trials=4", "routing.rate=interval(0,2)"], "routing.rate=2"),
        (["merge=cross,concat", "search=anneal"], "search=anneal: not known (options: grid, random, tpe, cmaes, nsgaii)"),
        (["optimizer.lr=tag(log,interval(0,1))"], "both above 0"),
        (["optimizer.lr=tag(lgo,interval(0,1))"], "tag 'lgo' means nothing here"),
        (["merge=cross,concat", "baseline=merge=add"], "baseline=merge=add: no such setting"),
        (["merge=cross,concat", "iso=seconds"], "iso=seconds: the baseline's budget names none"),
        (["merge=cross,concat", "iso=steps", "budget.steps=3,4"], "iso=steps: budget.steps is swept"),
        (["merge=cross,concat", "alpha=5"], "alpha=5.0: expected a probability"),
        (["merge=cross,concat", "launcher.nodes=2"], "launcher.nodes=2: this machine is one"),
        (
            ["merge=cross,concat", "launcher.partitions=gpu"],
            "launcher.partitions: no such option; did you mean 'launcher.partition'",
        ),
        (["merge=cross,concat", "retry_failed=maybe"], "retry_failed=maybe: expected true or false"),
        (["merge=cross,concat", "storage=study.db", "search=tpe", "trials=1"], None),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    if message is None:
        from hdm.launch.campaign import Campaign

        sweep = parse(arguments)
        sweep.folder.mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"storage=study\.db: expected sqlite:///FILE\.db or postgresql"):
            Campaign(sweep)
        return
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge: {cross: {}, conact: {}}", "sweeps/mine.yaml: merge: conact: no such variant; did you mean 'concat'"),
        ("merge: []", "merge: []: expected a list of values"),
        ("bundles: {width: {a: {model.dim: 1}}}", "bundles.width: expected two values or more"),
        ("bundles: [a, b]", "bundles: ['a', 'b']: expected a mapping"),
        ("bundles: {width: {a: 3, b: 4}}", "bundles.width.a: 3: expected a mapping"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse(["sweep=mine"])
    assert message in str(error.value)
