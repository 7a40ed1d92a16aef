import dataclasses
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm.config import compose as module
from hdm.config.axes import AXES, discover
from hdm.config.compose import compose, experiment_names, flatten, from_flat, split_sweep
from hdm.config.errors import ConfigError
from hdm.config.lines import Line, quote, settle
from hdm.config.schema import RunConfig

discover()


def test_schema_has_a_field_for_every_axis_and_no_other_untyped_field():
    hints = typing.get_type_hints(RunConfig)
    assert [name for name, kind in hints.items() if kind is typing.Any] == list(AXES)


def test_groups_fields_and_command_line_order():
    run = compose(["merge=concat", "routing.rate=0.75", "model=tiny", "model.dim=128", "model.heads=2"])
    flat = flatten(run)
    assert flat["merge"] == "concat"
    assert flat["routing.rate"] == 0.75
    assert flat["model.dim"] == 128
    assert flat["model.mlp_dim"] == 768


def test_later_lines_win_and_another_variant_drops_the_fields_of_the_previous():
    lines = [Line("routing", "tread", "a"), Line("routing.rate", "0.5", "a"), Line("routing", "none", "b")]
    assert [line.key for line in settle(lines)] == ["routing"]
    kept = settle([*lines[:2], Line("routing", "tread")])
    assert {line.key: line.value for line in kept} == {"routing": "tread", "routing.rate": "0.5"}
    assert settle([Line("seed", "1"), Line("seed", "2")])[0].value == "2"


def test_the_order_on_the_command_line_does_not_matter():
    assert compose(["data.path=/shards", "data=webdataset"]) == compose(["data=webdataset", "data.path=/shards"])
    assert compose(["model.depth=3", "model=tiny"]).model.depth == 3
    with pytest.raises(ConfigError, match="routing=none has no field 'rate'"):
        compose(["routing.rate=0.5", "routing=none"])


def test_another_variant_of_a_stored_run_starts_from_its_defaults():
    stored = flatten(compose(["guidance=cfg", "guidance.scale=7"]))
    assert from_flat(stored, ["guidance.scale=5"]).guidance.scale == 5
    assert from_flat(stored, ["guidance=routed"]) == compose(["guidance=routed"])


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes_and_survives_flattening(name):
    run = compose([f"experiment={name}"])
    assert run.experiment == name
    assert from_flat(flatten(run)) == run


@pytest.mark.parametrize("preset", ["xut_report", "xut_upstream"])
def test_presets_compose_and_the_command_line_wins(preset):
    assert flatten(compose([f"preset={preset}", "captions.text_dropout=0.2"]))["captions.text_dropout"] == 0.2


def test_flat_configuration_covers_every_leaf():
    run = compose(["track.uri='sqlite:///a b.db'", "name=" + quote("it's"), "eval.metrics=[]"])
    assert from_flat(flatten(run)) == run
    assert flatten(run)["track.uri"] == "sqlite:///a b.db"
    assert len(flatten(run)) > sum(1 for _ in dataclasses.fields(run))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_any_text_survives_quoting(text):
    parsed = module._hydra_parse(f"name={quote(text)}").value()
    assert (str(parsed.text) if hasattr(parsed, "text") else parsed) == text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dmi=3"], r"model\.dmi=3: model has no field 'dmi'; did you mean 'model\.dim'\?"),
        (["merge=crosss"], r"merge=crosss: no such variant; did you mean 'cross'\? \(options: .*cross"),
        (["position=axial_rope"], r"no such variant; did you mean encoding=axial_rope\?"),
        (["model=huge"], r"model=huge: no such preset \(options: nano, tiny, small, base, large\)"),
        (["experiment=openmoji_nan"], r"no such experiment; did you mean 'openmoji_nano'\?"),
        (["preset=xut_reprot"], r"no such preset; did you mean 'xut_report'\?"),
        (["rate=0.5"], r"no such key 'rate'; did you mean 'routing\.rate'\?"),
        (["model.dim=wide"], r"model\.dim=wide: expected an integer"),
        (["budget.steps=many"], r"budget\.steps=many: expected an integer or null"),
        (["train.precision=fp8"], r"train\.precision=fp8: expected one of bf16, fp32"),
        (["routing=none", "routing.rate=0.5"], r"routing=none has no field 'rate'; it is a field of routing=tread"),
        (["train=5"], r"'train' is a group of fields; set one of train\.batch_size"),
        (["model.dim=1000"], r"model\.dim=1000: is not model\.heads x model\.head_dim = 8 x 128"),
        (
            ["train.batch_size=10", "train.accumulation=4"],
            r"train\.accumulation=4: does not divide train\.batch_size=10.*1, 2, 5, 10",
        ),
        (["captions.tag_dropout=1.5"], r"captions\.tag_dropout=1\.5: must be between 0 and 1"),
        (["seed"], r"'seed' is not of the form key=value"),
        (["+model.extra=1"], r"keys cannot be added or removed"),
        (["merge=cross,concat"], r"names several values, a run takes one; use python -m hdm\.sweep merge=cross,concat"),
        (["plugins=[no_such_module]"], r"plugins: cannot import 'no_such_module'"),
        (["name=a b=c]"], r"name=a b=c\]"),
        (["timestep.mean=nan"], r"timestep\.mean=nan: must be a finite number"),
        (["optimizer.betas=[0.9,inf]"], r"optimizer\.betas=inf: must be a finite number"),
        (["budget.steps=2.5"], r"budget\.steps=2\.5: expected an integer or null"),
        (["model.dim=[3]"], r"model\.dim=\[3\]: expected an integer"),
        (["captions.shuffle={a:1}"], r"captions\.shuffle=\{a:1\}: expected true or false"),
        (["optimizer.betas=[a,b]"], r"optimizer\.betas=\[a,b\]: expected a list \[a,b\], each a number"),
        (["stages=3"], r"stages=3: expected a list .* with the fields name, images"),
        (["stages=[{nam:x}]"], r"stages=\[\{nam:x\}\]: Key 'nam' .*with the fields name, images"),
        (["stages=[{images:abc}]"], r"stages=\[\{images:abc\}\]: Value 'abc' .*converted to Integer"),
    ],
)
def test_bad_input_gets_one_clear_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


def test_experiment_files_are_checked_like_the_command_line(tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.yaml").write_text("base: openmoji_nano\nmodel: {dmi: 3}\n")
    (folder / "circle.yaml").write_text("base: circle\n")
    (folder / "broken.yaml").write_text("model: [\n")
    (folder / "list.yaml").write_text("- model\n")
    (folder / "words.yaml").write_text("base: openmoji_nano\ntrack.uri: off\noptimizer.lr: 1e-3\nname: no\n")
    with pytest.raises(ConfigError, match=r"model\.dmi=3 \(experiments/mine\.yaml\)"):
        compose(["experiment=mine"])
    with pytest.raises(ConfigError, match="includes itself"):
        compose(["experiment=circle"])
    with pytest.raises(ConfigError, match="not readable as YAML"):
        compose(["experiment=broken"])
    with pytest.raises(ConfigError, match="a mapping of key: value"):
        compose(["experiment=list"])
    run = compose(["experiment=words"])
    assert (run.track.uri, run.optimizer.lr, run.name) == ("off", 1e-3, "no")
    assert run.text_encoder == compose(["experiment=openmoji_nano"]).text_encoder


def test_split_sweep_reads_hydras_grammar():
    fixed, swept = split_sweep(
        ["model=nano", "merge=cross,concat", "seed=range(0,3)", "routing.rate=choice(0.0,0.5)", "adaln=glob(s*)"]
    )
    assert fixed == ["model=nano"]
    assert swept["merge"] == ["cross", "concat"]
    assert swept["seed"] == ["0", "1", "2"]
    assert swept["routing.rate"] == ["0.0", "0.5"]
    assert set(swept["adaln"]) == {name for name in AXES["adaln"].names() if name.startswith("s")}
    with pytest.raises(ConfigError, match="a value stands twice"):
        split_sweep(["merge=cross,cross"])
