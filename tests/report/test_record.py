"""A sweep put together from what MLflow knows of it."""

import pytest

from hdm.config.errors import HdmError
from hdm.launch.arm import sweep_tag
from hdm.report.protocol import differences, flat
from hdm.report.record import ArmRecord, assemble, parse_setting
from hdm.report.store import TAG


def run(name, *, label="", params=None, metrics=None, tags=None, status="finished"):
    return ArmRecord(
        run=name, point={}, setting="", seed=0, run_id=f"id-{name}", status=status, params=params or {}, metrics=metrics or {},
        tags={"mlflow.runName": label} | (tags or {}),
    )  # fmt: skip


PARENT = run(
    "sweeps/x", params={"sweep.merge": "cross, concat", "sweep.seed": "0, 1", "sweep.metric": "fid", "sweep.direction": "maximize"}
)


def sheet(**changes):
    arms = [{"label": f"merge={m} seed=0", "setting": f"merge={m}", "seed": 0, "run": m} for m in ("cross", "concat")]
    return {
        "format": 1,
        "name": "x",
        "axes": {"merge": ["cross", "concat"]},
        "metric": "val/loss",
        "direction": "minimize",
        "arms": arms,
    } | changes


def test_the_tag_is_the_launchers():
    assert sweep_tag("x") == f"{TAG}x"


def test_labels_are_read_back():
    assert parse_setting("merge=cross routing.rate=0.5") == {"merge": "cross", "routing.rate": "0.5"}
    assert parse_setting("data.path=a b c merge=x") == {"data.path": "a b c", "merge": "x"}
    assert parse_setting("baseline") == {}


def test_sweep_json_says_what_was_planned():
    record = assemble("x", PARENT, [run("concat")], sheet(alpha=0.01, baseline="merge=concat", confirmatory=False))
    assert [(arm.setting, arm.status) for arm in record.arms] == [("merge=cross", "not started"), ("merge=concat", "finished")]
    assert (record.alpha, record.reference(), record.confirmatory, record.minimize) == (0.01, "merge=concat", False, True)


def test_without_sweep_json_the_arms_name_themselves_by_label_or_parameters():
    arms = [
        run("b", label="merge=concat seed=1", params={"seed": "1", "merge": "?"}),
        run("a", label="an older run with a name of its own", params={"seed": "0", "merge": "cross"}),
    ]
    record = assemble("x", PARENT, arms, None)
    assert [(arm.setting, arm.seed) for arm in record.arms] == [("merge=cross", 0), ("merge=concat", 1)]
    assert (record.metric, record.minimize, record.axes) == ("fid", False, {"merge": ["cross", "concat"]})


def test_of_two_runs_of_one_arm_the_later_counts():
    record = assemble("x", PARENT, [run("cross", metrics={"m": 1.0}), run("cross", metrics={"m": 2.0})], sheet())
    assert record.arms[0].metrics == {"m": 2.0}
    assert record.notes == ["1 older runs of the same arms are left out"]


def test_what_cannot_be_read_is_refused():
    with pytest.raises(HdmError, match="has no arm in MLflow"):
        assemble("x", PARENT, [], None)
    with pytest.raises(HdmError, match="format 2, this version reads 1"):
        assemble("x", PARENT, [], sheet(format=2))
    record = assemble("x", PARENT, [], sheet())
    with pytest.raises(HdmError, match=r"baseline=merge=cros: .*did you mean 'merge=cross'"):
        record.reference("merge=cros")


def arm(label, **params):
    made = run(label, params={k.replace("__", "."): v for k, v in params.items()}, metrics={"val/loss": 1.0})
    made.setting = label
    return made


def test_validation_losses_of_other_images_or_latents_do_not_mix():
    a, b = arm("a", validation__timesteps="8", autoencoder="pixel"), arm("b", validation__timesteps="4", autoencoder="pixel")
    assert differences("val/loss", [a, b], lambda *_: None) == ["validation.timesteps: 8 in a seed=0, 4 in b seed=0"]
    b.params["validation.timesteps"] = "8"
    a.datasets, b.datasets = {"validation": "one/val 1234"}, {"validation": "elsewhere/val 1234"}
    assert differences("val/loss", [a, b], lambda *_: None) == []
    b.datasets = {"validation": "one/val 5678"}
    assert differences("val/loss", [a, b], lambda *_: None) == ["held-out images: 1234 in a seed=0, 5678 in b seed=0"]


def test_protocols_that_differ_name_the_field():
    a, b = arm("a"), arm("b")
    for one, digest in ((a, "11111111"), (b, "22222222")):
        one.metrics, one.tags = {"kid": 1.0, "clip": 1.0}, {"protocol.fid": digest, "protocol.clip": "33333333"}
    contents = {
        "id-a": {"metrics": {"kid": 1}, "protocol": {"sampler": {"steps": 8}}},
        "id-b": {"metrics": {"kid": 1}, "protocol": {"sampler": {"steps": 16}}},
    }
    read = lambda run_id, path: contents[run_id]  # noqa: E731
    assert differences("kid", [a, b], read) == ["sampler.steps: 8 in a seed=0, 16 in b seed=0"]
    assert differences("clip", [a, b], read) == []
    assert differences("kid", [a, b], lambda *_: None) == ["protocol: 11111111 in a seed=0, 22222222 in b seed=0"]
    b.status = "failed"
    assert differences("kid", [a, b], read) == []
    assert flat({"a": {"b": 1, "c": {"d": None}}}) == {"a.b": "1", "a.c.d": "None"}
