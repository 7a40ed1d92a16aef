import csv
import json
import math

import pytest

from hdm.launch.noise import noise_floor
from hdm.launch.ranking import FEW_SEEDS, ONE_SEED, Ranking, Row
from hdm.stats import NoiseFloor
from hdm.sweep import parse
from hdm.track.events import EventLog


def rows(values, arguments=("merge=cross,concat,add", "seeds=2")):
    """Rows of a sweep from {label: value}; the others failed."""
    made = []
    for arm in parse(list(arguments)).arms:
        value = values.get(arm.label)
        metrics = {} if value is None else {"val/loss": value, "fid": 10 * value, "train/loss": 1.0, "cost/seconds": 36.0}
        made.append(Row(arm=arm, status="failed" if value is None else "finished", reason="" if value else "boom", metrics=metrics))
    return made


FULL = {"merge=cross seed=0": 0.4, "merge=cross seed=1": 0.6, "merge=concat seed=0": 0.3, "merge=concat seed=1": 0.5}


def test_settings_are_ranked_by_the_mean_over_seeds():
    ranking = Ranking(rows(FULL), metric="val/loss")
    assert list(ranking.settings) == ["merge=concat", "merge=cross", "merge=add"]
    lines = ranking.markdown().splitlines()
    # sample standard deviation of two values 0.2 apart: 0.2 / sqrt(2)
    assert f"| 1 | merge=concat | 0.4 ± {0.2 / math.sqrt(2):.2g} | 4 ± {2 / math.sqrt(2):.2g} |" in lines[2]
    assert lines[4].startswith("| - | merge=add |")
    assert "2 failed" in lines[4]
    assert "train/loss" not in lines[0]
    assert f"{FEW_SEEDS} merge=concat against merge=cross: cannot reach p < 0.05 with 2 seeds; 6 can." in lines


def test_the_sweeps_own_baseline_and_alpha_are_what_verdicts_go_by():
    said = Ranking(rows(FULL), metric="val/loss", baseline="merge=concat", alpha=0.2).headline()
    assert "merge=cross against merge=concat: cannot reach p < 0.2 with 2 seeds; 4 can." in said  # 2 / 2^4 = 0.125
    assert "against merge=cross" not in said


def test_what_is_ahead_by_less_than_the_noise_band_shares_a_rank_and_wins_nothing():
    values = {f"merge={m} seed={s}": v + s for m, v in (("cross", 0.40), ("concat", 0.35), ("add", 0.1)) for s in range(8)}
    seeds = ("merge=cross,concat,add", "seeds=8")
    spread = 0.1 / NoiseFloor(spread=1.0, freedom=6, paired=True).band(8)  # a band of ± 0.1
    near = Ranking(rows(values, seeds), metric="val/loss", noise=NoiseFloor(spread=spread, freedom=6, paired=True))
    assert near.ranks() == {"merge=add": 1, "merge=concat": 2, "merge=cross": 2}
    assert "Differences of means within ± 0.1 are noise, as between arms that do not differ, and share a rank." in near.headline()
    assert "merge=concat against merge=cross: inconclusive: inside the noise band." in near.headline()
    assert "merge=add against merge=cross: better." in near.headline()
    assert near.leader() == "merge=add"
    wide = Ranking(rows(values, seeds), metric="val/loss", noise=NoiseFloor(spread=4 * spread, freedom=6))
    assert set(wide.ranks().values()) == {1}
    assert wide.leader() == "merge=cross"  # nobody beats the baseline
    without = Ranking(rows(values, seeds), metric="val/loss")
    assert (without.leader(), without.ranks()["merge=cross"]) == ("merge=add", 3)


def test_the_noise_band_is_that_of_the_arms_of_the_named_sweep(tmp_path):
    """Twins that are 0.2 apart for every seed; one arm of the second seed did not end."""
    name = "twin-0badcafe"
    folder = tmp_path / "runs" / "sweeps" / name
    folder.mkdir(parents=True)
    sweep = parse(["merge=cross,concat", f"noise_floor={name}"])
    assert "noise_floor=twin-0badcafe: no such sweep below runs" in noise_floor(sweep)[1]
    arms = [{"setting": f"twin={t}", "seed": s, "run": f"{t}-{s}"} for t in ("one", "other") for s in range(3)]
    (folder / "sweep.json").write_text(json.dumps({"arms": arms}))
    assert "has val/loss for no two arms" in noise_floor(sweep)[1]
    for arm in arms:
        log = EventLog(tmp_path / "runs" / arm["run"])
        log.metrics({"val/loss": arm["seed"] + (0.2 if arm["setting"] == "twin=other" else 0)}, 10)
        log.status("interrupted" if arm["run"] == "other-1" else "finished")
    assert noise_floor(sweep) == (NoiseFloor(spread=pytest.approx(0.2 / math.sqrt(2)), freedom=2, paired=True), "")


def test_more_may_be_better():
    ranking = Ranking(rows(FULL), metric="fid", direction="maximize")
    assert list(ranking.settings) == ["merge=cross", "merge=concat", "merge=add"]
    assert ranking.summary()["sweep/best"] == pytest.approx(5.0)


def test_one_seed_proves_nothing():
    ranking = Ranking(rows({"merge=cross": 0.4, "merge=concat": 0.5}, ["merge=cross,concat"]), metric="val/loss")
    assert ONE_SEED in ranking.markdown()
    assert "±" not in ranking.markdown()


def test_a_value_that_is_not_finite_does_not_win():
    ranking = Ranking(rows(FULL | {"merge=cross seed=0": float("nan"), "merge=cross seed=1": float("nan")}), metric="val/loss")
    assert next(iter(ranking.settings)) == "merge=concat"
    assert "| - | merge=cross |" in ranking.markdown()


def test_metric_that_nobody_measured_is_said():
    ranking = Ranking(rows(FULL), metric="val/los")
    assert ranking.missing().startswith("metric=val/los: no arm measured it; they measured cost/seconds, fid")
    assert Ranking(rows({}), metric="val/loss").missing() == ""


def test_files_hold_every_arm(tmp_path):
    ranking = Ranking(rows(FULL), metric="val/loss")
    _, table, mlflow = ranking.write(tmp_path)
    with open(table, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert [line["val/loss"] for line in lines] == ["0.3", "0.5", "0.4", "0.6", "", ""]
    assert (lines[-1]["merge"], lines[-1]["status"], lines[-1]["reason"]) == ("add", "failed", "boom")
    content = json.loads(mlflow.read_text())
    assert content["columns"][:3] == ["rank", "setting", "val/loss"]
    assert len(content["data"]) == 3


def test_costs_come_from_the_run_folder(tmp_path):
    arm = parse(["merge=cross,concat"]).arms[0]
    log = EventLog(arm.folder)
    log.metrics({"cost/seconds": 20.0, "cost/flops": 8e9, "val/loss": 0.9}, 400)
    (arm.folder / "result.json").write_text(json.dumps({"status": "finished", "samples": 400, "metrics": {"val/loss": 0.8}}))
    row = Row.of(arm, "finished", parameters=1234)
    assert row.metrics["val/loss"] == 0.8
    assert row.fixed() == {
        "samples": 400.0, "images_per_second": 20.0, "hours": 20 / 3600, "parameters": 1234.0, "flops_per_sample": 2e7,
    }  # fmt: skip
    assert "20M" in Ranking([row], metric="val/loss").markdown()
