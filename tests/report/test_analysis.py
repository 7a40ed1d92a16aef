"""What a report says, from records in memory: verdicts, budgets, warnings, refusals, and pages of any size."""

import math
import re

import numpy as np
import pytest
import torch
from synthetic import CAPTIONS, tile

from hdm.config.errors import HdmError
from hdm.pictures import sheet
from hdm.report import figures, gallery, sections, words
from hdm.report.analysis import analyse
from hdm.report.page import Report
from hdm.report.record import ArmRecord, SweepRecord, parse_setting


def nothing(*_):
    return None


def arm(setting, seed, value=None, *, status="finished", metric="val/loss", params=(), **metrics):
    point = parse_setting(setting)
    measured = {} if value is None else {metric: value}
    return ArmRecord(
        run=f"{setting}-{seed}", point=point, setting=setting, seed=seed, run_id=f"{setting}-{seed}", status=status,
        params={"budget.samples": "400", "budget.steps": "null", "seed": str(seed), "crop.size": "16", "sampling.grid": "16"}
        | point | dict(params),
        metrics=measured | {"model/parameters": 1000.0, "cost/seconds": 20.0, "cost/flops": 1e9} | metrics,
    )  # fmt: skip


def sweep(arms, **fields):
    keys = dict.fromkeys(key for a in arms for key in a.point)
    axes = {key: list(dict.fromkeys(a.point[key] for a in arms if key in a.point)) for key in keys}
    return SweepRecord(name="x-1", run_id="parent", arms=arms, axes=axes, **fields)


def pairs(seeds, effects, spread=0.01):
    """Arms of settings with true differences `effects` from the first, all sharing 0.5 + seed / 100."""
    rng = np.random.default_rng(0)
    return [
        arm(setting, seed, 0.5 + seed / 100 + effect + float(rng.normal(0, spread)))
        for setting, effect in effects.items()
        for seed in range(seeds)
    ]


def page(analysis, drawings=(), galleries=()):
    return Report(analysis=analysis, drawings=list(drawings), galleries=list(galleries), environment={})


def text_of(analysis):
    return " ".join(
        [
            *words.headline(analysis),
            words.budget(analysis),
            words.planning(analysis),
            words.noise(analysis),
            *words.warnings(analysis),
        ]
    )


CLEAR = {"merge=cross": 0.0, "merge=concat": -0.1}


def test_a_clear_difference_is_told_with_all_that_belongs_to_it():
    a = analyse(sweep(pairs(8, CLEAR)), nothing)
    (line,) = words.headline(a)
    assert line.startswith("merge=concat is better than merge=cross: −0.")
    assert line.endswith("8 paired seeds, p = 0.008.")
    row = sections.results(a).rows[0]
    assert (row[0], row[1], row[-1]) == ("merge=concat", "8", "better")
    assert sections.results(a).columns == ["setting", "seeds", "val/loss", "difference", "95 % CI", "95 % CI (BCa)", "p", "verdict"]
    assert words.budget(a) == "Iso-samples: every arm had a budget of 400 samples."
    assert "is found with a probability of 80 %" in words.planning(a)


def test_few_seeds_cannot_reach_significance_and_the_page_says_so():
    a = analyse(sweep(pairs(3, CLEAR)), nothing)
    assert sections.results(a).rows[0][-1] == "cannot reach p < 0.05 with 3 seeds; 6 can"
    assert "no difference, however large, can reach p < 0.05: it takes 6 seeds" in words.planning(a)
    assert "cannot reach p &lt; 0.05 with 3 seeds" in page(a).html().lower()


def test_small_differences_drown_in_the_noise_floor():
    noise = sweep([arm("baseline", seed, 0.5 + 0.3 * (seed % 2)) for seed in range(8)])
    a = analyse(sweep(pairs(8, CLEAR)), nothing, noise=noise)
    assert a.comparisons["merge=concat"].words == "inconclusive: inside the noise band"
    # t of 7 degrees of freedom x sd of four 0 and four 0.3 x sqrt(2 / 8)
    assert a.comparisons["merge=concat"].band == pytest.approx(2.364624 * 0.3 * math.sqrt(8 / 7) / 2 * 0.5, rel=1e-5)
    assert "Inconclusive: inside the noise band" in page(a).html()
    with pytest.raises(HdmError, match=r"noise_floor=x-1: it has val/loss for no two arms"):
        analyse(sweep(pairs(8, CLEAR)), nothing, noise=sweep([arm("baseline", 0, 0.5)]))


def test_an_aa_sweep_of_something_else_is_pointed_out():
    noise = sweep([arm("baseline", seed, 0.5, params={"merge": "cross", "model.dim": "9"}) for seed in range(8)])
    a = analyse(sweep(pairs(8, CLEAR)), nothing, noise=noise)
    assert "model.dim=9 there,  here" in text_of(a)


def test_one_seed_one_arm_and_no_value():
    one = analyse(sweep(pairs(1, CLEAR)), nothing)
    assert "cannot reach p < 0.05 with one seed; 6 can" in text_of(one).replace("Cannot", "cannot")
    alone = analyse(sweep(pairs(4, {"baseline": 0.0})), nothing)
    assert words.headline(alone) == ["The sweep has one setting, baseline: there is nothing to compare it with."]
    assert figures.forest(alone) is None
    empty = analyse(sweep([arm("merge=a", 0), arm("merge=b", 0)]), nothing)
    assert "val/loss was not measured in merge=a seed=0, merge=b seed=0" in text_of(empty)
    assert figures.pareto(empty) is None
    for analysis in (one, alone, empty):
        assert "<table" in page(analysis).html()


def test_what_is_missing_is_told_and_only_common_seeds_are_paired():
    arms = pairs(8, CLEAR | {"merge=add": 0.2})
    arms[9] = arm("merge=concat", 1, status="failed")
    arms[9].reason = "TrainingError: the loss is nan"
    arms[18] = arm("merge=add", 2, math.nan)
    a = analyse(sweep(arms), nothing)
    told = text_of(a)
    assert "1 of 24 arms failed: merge=concat seed=1 (TrainingError: the loss is nan)." in told
    assert "val/loss is not finite in merge=add seed=2: left out" in told
    assert "merge=concat is compared over 7 common seeds; seed 1 is not in both arms." in told
    assert len(a.comparisons["merge=add"].seeds) == 7
    rows = {row[0]: row for row in sections.every_seed(a).rows}
    assert rows["merge=concat"][2] == "failed"
    assert rows["merge=add"][3] == "not finite"


def test_a_search_is_not_called_a_test():
    a = analyse(sweep(pairs(8, CLEAR), confirmatory=False, sampler="tpe", pruner="median"), nothing)
    assert "This was a search, not a test" in text_of(a)
    assert "a search (tpe, median)" in page(a).html()


def test_protocols_do_not_mix():
    arms = pairs(6, CLEAR)
    for a in arms[6:]:
        a.params["validation.timesteps"] = "4"
    with pytest.raises(
        HdmError, match=r"metric=val/loss: was measured under different protocols.*validation.timesteps: nothing in merge=cross"
    ):
        analyse(sweep(arms), nothing)


def test_another_metric_that_mixes_protocols_gets_no_column():
    arms = [arm(s, i, 0.5, **{"kid/x": 0.1, "val/loss_raw": 0.6}) for s in CLEAR for i in range(2)]
    for a in arms:
        a.tags["protocol.fid"] = "1" * 8 if a.setting == "merge=cross" else "2" * 8
    a = analyse(sweep(arms), lambda run_id, _: {"metrics": {"kid/x": 0.1}, "protocol": {"steps": run_id.startswith("merge=cross")}})
    assert a.others == ["val/loss_raw"]
    assert any("kid/x is left out" in note and "steps" in note for note in a.notes)


def test_which_way_is_better():
    arms = [arm(s, i, 0.5 + e, metric="odd", **{"kid/x": 0.5 - e, "clip/y": 0.1}) for s, e in CLEAR.items() for i in range(6)]
    assert analyse(sweep(arms, metric="odd", direction="maximize"), nothing).minimize is False
    assert analyse(sweep(arms), nothing, metric="kid/x").minimize is True
    assert analyse(sweep(arms), nothing, metric="clip/y").minimize is False
    with pytest.raises(HdmError, match="metric=odd: say which way is better"):
        analyse(sweep(arms), nothing, metric="odd")


def test_budgets_are_named_and_what_is_unequal_too():
    arms = pairs(6, CLEAR)
    for a in arms[6:]:
        a.metrics["model/parameters"] = 1500.0
    assert "parameters (1.50x)" in words.budget(analyse(sweep(arms), nothing))
    arms[0].params["budget.samples"] = "800"
    assert words.budget(analyse(sweep(arms), nothing)).startswith("The arms had different budgets")
    iso = analyse(sweep(arms, budget={"iso": "flops"}), nothing)
    assert words.budget(iso).startswith("Iso-flops: every arm got as many flops as merge=cross")


def test_only_differences_of_configuration_are_shown_and_the_common_ones_folded():
    a = analyse(sweep(pairs(2, CLEAR)), nothing)
    assert sections.configuration(a).columns == ["setting", "merge"]
    assert ["crop.size", "16"] in sections.shared(a).rows
    assert "seed" not in dict(sections.shared(a).rows)


@pytest.fixture(scope="module")
def wide():
    """150 settings of two axes with 2 seeds; benchmarks/report.py has 1,000 arms."""
    rng = np.random.default_rng(1)
    effects = {f"a={i} b={j}": i / 10 + float(rng.normal(0, 0.01)) for i in range(15) for j in range(10)}
    return analyse(sweep(pairs(2, effects)), nothing)


def test_hundreds_of_arms_fit_on_a_page(wide):
    assert len(wide.comparisons) == 149
    assert next(iter(wide.importance)) == "a"
    drawing = figures.forest(wide)
    assert "Of 149 settings the 40 with the best means are drawn" in drawing.caption
    html = page(wide, [drawing, figures.pareto(wide)]).html()
    assert "<summary>All settings (150 rows)</summary>" in html
    assert len(html) < 1_000_000


def test_the_page_asks_nothing_of_any_network_and_escapes_what_it_shows():
    evil = {"merge=<script>alert(1)</script>": 0.0, "merge=b&c": -0.1}
    a = analyse(sweep(pairs(8, evil), command='python -m hdm.sweep "<b>"'), nothing)
    drawings = [figures.forest(a), figures.pareto(a), figures.curves(a, {s: {0: [(0, 1.0), (1, 0.5)]} for s in evil})]
    html = page(a, drawings).html()
    assert "<script" not in html and "<b>" not in html
    addresses = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in html and "url(http" not in html
    assert set(re.findall(r"https?://[^\s\"<]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_figures_are_the_same_bytes_every_time():
    a = analyse(sweep(pairs(8, CLEAR)), nothing)
    first, second = figures.forest(a), figures.forest(a)
    assert (first.svg, first.png) == (second.svg, second.png)
    assert "currentColor" in first.inline()
    assert "#010203" not in first.inline()


def test_curves_keep_every_seed_and_steps_that_all_have():
    steps, mean, spread = figures._band([[(0, 1.0), (10, 2.0), (20, 9.0)], [(0, 3.0), (10, 2.0)]])
    assert (steps, list(mean)) == ([0, 10], [2.0, 2.0])
    assert list(spread) == pytest.approx([math.sqrt(2), 0.0])


def png(count, labels=CAPTIONS):
    import io

    images = torch.stack([tile(1, 0, i) for i in range(count)])
    file = io.BytesIO()
    sheet(images, [labels[i % 4] for i in range(count)]).save(file, "PNG")
    return images, file.getvalue()


@pytest.mark.parametrize("count", [1, 3, 4, 7, 16])
def test_a_grid_is_cut_into_the_pictures_that_it_was_made_of(count):
    images, picture = png(count)
    grid = gallery.cut(picture, arm("merge=cross", 0))
    assert len(grid.tiles) == count
    for image, found in zip(images, grid.tiles):
        assert torch.equal(image, torch.from_numpy(np.asarray(found).copy()).permute(2, 0, 1))
    strip = np.asarray(grid.strips[0])
    assert strip.min() < 128  # the caption is written there


def test_a_picture_of_another_layout_is_left_alone():
    _, picture = png(4)
    assert gallery.cut(picture, arm("merge=cross", 0, params={"crop.size": "40"})) is None
    assert gallery.cut(picture, arm("merge=cross", 0, params={"crop.size": "x"})) is None


def test_all_seeds_have_their_pictures_the_first_one_open():
    a = analyse(sweep(pairs(3, CLEAR)), nothing)
    _, picture = png(4)
    grids = {x.run_id: gallery.cut(picture, x) for x in a.record.arms}
    found = gallery.galleries(a, grids, CAPTIONS)
    assert [g.seed for g in found] == [0, 1, 2]
    html = page(a, galleries=found).html()
    assert html.count("<img") == 3 * 2 * 4
    assert "a &lt;b&gt;bold&lt;/b&gt; face &amp; more" in html
    strips = gallery.galleries(a, grids, [])[0].html()
    assert strips.count("<img") == 2 * 4 + 4
