"""The commands beyond eval.fid and eval.clip, on a trained run in miniature."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from eval import camera, gallery, guidance, metrics, presets
from eval.extractor import EXTRACTORS
from eval.metrics import evaluate, evaluate_in_training
from eval.preference import JUDGES
from hdm import cli
from hdm.config.amend import amend
from hdm.config.errors import AssetError, DataError, HdmError
from hdm.config.schema import Metric
from hdm.track.events import EventLog, read
from hdm.track.protocol import reports


def command(name, *arguments, capsys):
    """Exit code, stdout and stderr of `python -m eval.NAME`."""
    module = __import__(f"eval.{name}", fromlist=["command"])
    with pytest.raises(SystemExit) as end:
        cli.main(module.command, module.__doc__, arguments)
    out = capsys.readouterr()
    return end.value.code, out.out, out.err


def test_all_measures_what_can_be_had_and_names_the_rest(trained, capsys):
    code, out, err = command("all", f"ckpt={trained}", "eval.bootstrap=5", capsys=capsys)
    assert code == 0, err
    for name in ("fd_dinov2", "cmmd", "preference"):
        assert f"eval.{name} is left out" in err
    found = reports(trained)
    measured = {"fid", "kid", "precision", "recall", "density", "coverage", "alignment", "loss", "memorisation"}
    assert {name.partition("/")[0] for name in found} == measured
    for name, number in found.items():
        assert np.isfinite(number.value)
        assert name.endswith("_real") or number.error >= 0, name
        assert number.digest in out
    assert list((trained / "eval").glob("*/memorisation.png"))
    events = [event.data["values"] for event in read(trained) if event.type == "metrics"]
    assert any("eval/error/kid/efficientnet" in values for values in events)


def test_kid_alone_is_the_kid_beside_fid(trained):
    both, alone = evaluate(trained, ["fid"]), evaluate(trained, ["kid"])
    assert alone == {"kid/efficientnet": both["kid/efficientnet"]}


def test_validation_loss_is_the_one_of_training(trained):
    found = evaluate(trained, ["valloss"])
    trained_on = [e.data["values"]["val/loss"] for e in read(trained) if e.type == "metrics" and "val/loss" in e.data["values"]]
    assert found["loss/velocity"] == pytest.approx(trained_on[-1], rel=1e-6)
    assert found["loss/text"] == pytest.approx(found["loss/unconditional"] - found["loss/velocity"], abs=1e-12)
    assert not list((trained / "eval").glob("*/samples-*"))  # nothing was drawn


def test_a_reference_file_gives_the_numbers_and_the_protocol_of_its_images(trained, capsys):
    code, _, err = command("reference", f"ckpt={trained}", "out=ref.safetensors", capsys=capsys)
    assert code == 0, err
    own = evaluate(trained, ["fid"])
    of_file = evaluate(trained, ["fid"], overrides=["eval.reference=ref.safetensors"])
    assert of_file == pytest.approx(own, rel=1e-9)
    digests = {json.loads(path.read_text())["protocol_digest"] for path in (trained / "eval").glob("fid*.json")}
    assert len(digests) == 1
    against_training = evaluate(trained, ["fid"], overrides=["eval.reference=train"])
    assert against_training["fid/efficientnet"] != own["fid/efficientnet"]


def test_in_training_numbers_stand_at_their_samples_and_nothing_else_moves(trained):
    run = metrics.load(trained).run
    checkpoint = trained / "checkpoints" / "samples-000000008"
    before = torch.random.get_rng_state()
    found = evaluate_in_training(checkpoint, amend(run, ["eval.metrics=[kid]"]), recorder=EventLog(trained), samples=8)
    assert set(found) == {"eval/kid/efficientnet"}
    assert torch.equal(torch.random.get_rng_state(), before)
    (event,) = [e for e in read(trained) if e.type == "metrics" and "eval/kid/efficientnet" in e.data["values"]]
    assert event.data["samples"] == 8
    assert "kid/efficientnet" not in reports(trained)  # the number of the finished run is another


def test_a_preset_is_its_lines_and_too_few_prompts_are_refused(trained, monkeypatch, capsys):
    small = presets.Preset(purpose="", lines=("eval.samples=30", "eval.repeat=true", "sampler.steps=1"), prompts=0)
    monkeypatch.setitem(presets.PRESETS, "small", small)
    code, _, err = command("kid", f"ckpt={trained}", "protocol=small", "eval.bootstrap=0", capsys=capsys)
    assert code == 0, err
    (report,) = [json.loads(path.read_text()) for path in (trained / "eval").glob("kid*.json")]
    assert report["preset"] == "small"
    assert (report["protocol"]["samples"], report["protocol"]["sampler"]["steps"]) == (30, 1)
    code, _, err = command("kid", f"ckpt={trained}", "protocol=coco30k", capsys=capsys)
    assert code == 2
    assert "needs 30,000 held-out captions and the val split" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fd_dinov2", "eval.dinov2=facebook/dinov2-large: no DINOv2 in this folder or in the hub's cache; run `hf download"),
        ("cmmd", "eval.clip=openai/clip-vit-large-patch14: no CLIP in this folder or in the hub's cache"),
        ("preference", "eval.judge=yuvalkirstain/PickScore_v1: no CLIP"),
    ],
)
def test_missing_weights_are_one_line(trained, name, words, capsys):
    code, _, err = command(name, f"ckpt={trained}", capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]


def test_empty_captions_are_refused(trained, monkeypatch):
    from eval import samples

    original = samples.read_images

    def emptied(*arguments, **options):
        found = original(*arguments, **options)
        found.captions[:] = [""] * len(found)
        return found

    monkeypatch.setattr(samples, "read_images", emptied)
    with pytest.raises(DataError, match="all captions of its val split are empty"):
        evaluate(trained, ["fid"])


def test_every_metric_is_listed_with_a_command_of_its_own():
    import importlib

    assert set(metrics.METRICS) == set(Metric)
    for metric in Metric:
        doc = importlib.import_module(f"eval.{metric}").__doc__
        assert f"usage: python -m eval.{metric} ckpt=" in doc


def test_a_judge_of_a_plug_in_scores(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_judges.py").write_text(
        "from dataclasses import dataclass\n"
        "from eval.preference import JUDGES, Judge\n"
        "@dataclass(kw_only=True, slots=True)\n"
        "class LightConfig:\n"
        "    '''Mean brightness.'''\n"
        "@JUDGES.register('light', LightConfig)\n"
        "class Light(Judge):\n"
        "    def __init__(self, config, options, device): pass\n"
        "    def score(self, images, captions): return [float(i.double().mean()) for part in images.parts() for i in part]\n"
        "    def facts(self): return {'name': 'light'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(JUDGES, "variants", dict(JUDGES.variants))
    arguments = ["plugins=[my_judges]", "eval.preference=light", "eval.bootstrap=5"]
    code, _, err = command("preference", f"ckpt={trained}", *arguments, capsys=capsys)
    assert code == 0, err
    (path,) = (trained / "eval").glob("preference*.json")
    values = json.loads(path.read_text())["metrics"]
    assert 0 < values["preference/light"] < 255
    code, _, err = command("preference", f"ckpt={trained}", "eval.preference=lihgt", capsys=capsys)
    assert code == 2
    assert "did you mean 'light'?" in err


def test_an_extractor_of_a_plug_in_serves_every_distance(trained, tmp_path, monkeypatch, capsys):
    """Its features are the mean of each channel, so the Fréchet distance can be had from three numbers an image."""
    (tmp_path / "my_extractors.py").write_text(
        "from dataclasses import dataclass\n"
        "from eval.extractor import EXTRACTORS, Extractor\n"
        "@dataclass(kw_only=True, slots=True)\n"
        "class BrightnessConfig:\n"
        "    '''The mean of each channel.'''\n"
        "    over: float = 255.0\n"
        "@EXTRACTORS.register('brightness', BrightnessConfig)\n"
        "class Brightness(Extractor):\n"
        "    preprocessing, digest = 'none', 'none'\n"
        "    def network(self, device):\n"
        "        return lambda images: images.double().mean(dim=(2, 3)) / self.config.over\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(EXTRACTORS, "variants", dict(EXTRACTORS.variants))  # no other test has the plug-in's
    arguments = ["plugins=[my_extractors]", "eval.features=brightness", "eval.bootstrap=5"]
    for name in ("fd", "fid"):
        code, _, err = command(name, f"ckpt={trained}", *arguments, capsys=capsys)
        assert code == 0, err
    report = json.loads((trained / "eval" / "fd-brightness.json").read_text())
    assert set(report["metrics"]) == {"fd/brightness", "kd/brightness"}
    facts = {"name": "brightness", "layer": "", "weights": "none", "preprocessing": "none", "over": 255.0}
    assert report["protocol"]["extractor"] == facts
    drawn, _ = metrics.draw(metrics.load(trained))
    x, y = (torch.cat(list(p.parts())).double().mean(dim=(2, 3)).numpy() / 255 for p in (drawn.pictures, drawn.real.pictures))
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert report["metrics"]["fd/brightness"] == pytest.approx(wanted, rel=1e-6)  # features are kept in single precision
    assert json.loads((trained / "eval" / "fid-brightness.json").read_text())["metrics"]["fid/brightness"] == pytest.approx(wanted)
    code, _, err = command("fd", f"ckpt={trained}", "eval.features=brightnes", capsys=capsys)
    assert code == 2
    assert "eval.features=brightnes: no such variant; did you mean 'brightness'? (options: inception, efficientnet," in err


# --- guidance, camera, gallery ----------------------------------------------------------------------------------------


def test_guidance_shows_the_default_and_the_best_of_the_grid(trained, capsys):
    options = ["guidance_grid=[1,6]", "eval.bootstrap=0", "by=alignment"]
    code, out, err = command("guidance", f"ckpt={trained}", *options, capsys=capsys)
    assert code == 0, err
    (path,) = (trained / "eval").glob("guidance-*.json")
    found = json.loads(path.read_text())
    (curve,) = found["curves"]
    assert [point["scale"] for point in curve["points"]] == [1, 3, 6]
    best = max(curve["points"], key=lambda point: point["values"]["alignment/ridge_minilm"])
    assert f"{best['values']['alignment/ridge_minilm']:.4g}" in out
    assert len({point["digests"]["kid/efficientnet"] for point in curve["points"]}) == 3  # three protocols
    assert path.with_suffix(".png").stat().st_size > 5000
    for options, words in (
        (["by=luck"], "options: kid, fid, alignment"),
        (["guidance_grid=[a]"], "is no list of scales"),
        (["guidance=none"], "has no scale to vary"),
    ):
        code, _, err = command("guidance", f"ckpt={trained}", *options, capsys=capsys)
        assert (code, words in err) == (2, True), err


def test_arms_of_different_protocols_are_not_put_on_one_figure(tmp_path):
    values = {"kid/x": 1.0, "fid/x": 1.0, "alignment/y": 1.0}
    curves = []
    for arm, steps in (("a", 16), ("b", 32)):
        point = guidance.Point(scale=2, values=values, protocols={"kid/x": {"sampler": {"steps": steps}}})
        curves.append(guidance.Curve(label=arm, default=2, points=[point]))
    with pytest.raises(HdmError, match=r"^kid/x: a .* and b .* different protocols and are not compared: sampler.steps: 16 and 32"):
        guidance.show(curves, "kid", tmp_path / "g.png")


def test_best_is_least_distance_or_most_alignment():
    points = [guidance.Point(scale=s, values={"kid/x": k, "alignment/y": a}, protocols={}) for s, k, a in ((1, 2, 5), (2, 1, 3))]
    curve = guidance.Curve(label="a", default=1, points=points)
    assert curve.best("kid/x", "kid").scale == 2
    assert curve.best("alignment/y", "alignment").scale == 1
    assert curve.at_default().scale == 1


@pytest.mark.parametrize(
    ("scales", "kids", "words"),
    [
        ([1, 2, 4], [3, 2, 1], "4, the largest"),
        ([1, 2, 4], [1, 2, 3], "1, the least"),
        ([0, 2, 4], [1, 2, 3], ""),
        ([1, 2, 4], [2, 1, 3], ""),
    ],
)
def test_an_optimum_at_an_end_of_the_grid_is_told(scales, kids, words, tmp_path, capsys):
    points = [
        guidance.Point(scale=s, values={"kid/x": k, "fid/x": k, "alignment/y": 0.1 * s}, protocols={}) for s, k in zip(scales, kids)
    ]
    guidance.show([guidance.Curve(label="arm", default=2, points=points)], "kid", tmp_path / "g.png")
    err = capsys.readouterr().err
    assert (f"arm: the best scale by kid/x is {words} of the grid" in err) == bool(words)
    assert err.count("\n") == bool(words)


def test_camera_writes_a_sheet_for_each_study_and_its_measures(trained, capsys):
    options = ["n=2", "measured=4", "shifts=[0.25]", "zooms=[1.25]", "steps=[1,2]", "sizes=[16x16,8x32]", "rates=[0.5]", "noises=2"]
    code, out, err = command("camera", f"ckpt={trained}", *options, capsys=capsys)
    assert code == 0, err
    (folder,) = (trained / "eval").glob("camera-*")
    assert {path.stem for path in folder.glob("*.png")} == {
        *(f"{axis}{study}" for axis in "xy" for study in ("", "_moved", "_mean")), "zoom", "aspect", "steps", "rates",
    }  # fmt: skip
    report = json.loads((folder / "camera.json").read_text())
    rows = {row["setting"]: row for row in report["settings"]}
    for setting in ("camera.x=0.25", "camera.y=0.25 moved", "camera.x=0.25 mean", "camera.y=0.25 control"):
        assert rows[setting]["asked"] == pytest.approx(-4.0)  # a quarter of 16 pixels, to the left and up
    measures = [f"{arm}{kind}" for arm in ("", "_moved", "_control") for kind in ("", "_within")] + ["_mean", "_loss"]
    assert set(report["metrics"]) == {"camera/zoom", *(f"camera/{axis}{measure}" for axis in "xy" for measure in measures)}
    assert all(np.isfinite(value) for value in report["metrics"].values())
    assert report["protocol_digest"] in out


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("shifts=[a]", "shifts=.*is no list of numbers"),
        ("zooms=[0]", "zooms=.*must be above 0"),
        ("rates=[1.5]", "rates=.*between 0 and 1"),
        ("sizes=[32]", "sizes=32: is not of the form HxW"),
        ("n=0", "n=0: must be a whole number, 1 or more"),
        ("frame=0.5", "frame=0.5: must be 1 or more"),
    ],
)
def test_camera_refuses_bad_options_in_one_line(option, words):
    with pytest.raises(HdmError, match=words):
        camera.parse([option])


def test_gallery_has_a_row_for_each_prompt_and_a_column_for_each_network(trained, capsys):
    initial = trained / "checkpoints" / "samples-000000000"
    prompts = ['prompt=a "red" <car>', "prompt=cat"]
    code, _, err = command("gallery", f"ckpt={initial},{trained}", *prompts, "out=shown", capsys=capsys)
    assert code == 0, err
    from html.parser import HTMLParser
    from pathlib import Path

    class Page(HTMLParser):
        def __init__(self):
            super().__init__()
            self.images, self.rows = [], 0

        def handle_starttag(self, tag, attributes):
            self.rows += tag == "tr"
            if tag == "img":
                self.images.append(dict(attributes))

    page = Page()
    page.feed(Path("shown/gallery.html").read_text())
    assert page.rows == 3
    assert [image["alt"] for image in page.images] == ['a "red" <car>'] * 2 + ["cat"] * 2
    assert page.images[0]["src"] != page.images[1]["src"]
    assert Path("shown/gallery.png").exists()


def test_an_empty_list_of_prompts_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "none.txt").write_text(" \n\n")
    code, _, err = command("gallery", f"ckpt={trained}", "prompts=none.txt", capsys=capsys)
    assert code == 2
    assert err == "error: prompts=none.txt: holds no prompt; write one a line\n"


def test_gallery_escapes_prompts():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    page = gallery.to_html(["<script>x</script>"], [gallery.Column(title="<b>", note="&", images=[image])])
    assert "<script>" not in page
    assert "<b>" not in page


def test_metrics_that_cannot_be_had_at_all_are_an_error(trained):
    with pytest.raises(HdmError, match="none of the metrics can be measured here"):
        metrics.measure(metrics.load(trained), ["cmmd"], skip=True)
    with pytest.raises(AssetError):
        metrics.measure(metrics.load(trained), ["cmmd"])


def test_every_help_and_every_missing_ckpt_is_answered_without_torch():
    import subprocess
    import sys
    from pathlib import Path

    names = [*map(str, Metric), "all", "reference", "guidance", "camera", "gallery"]
    code = f"""
import contextlib, importlib, io, sys
sys.modules["torch"] = None
from hdm import cli
for name in {names!r}:
    module = importlib.import_module("eval." + name)
    for arguments, wanted in ((["--help"], 0), (["out=x.safetensors"] if name == "reference" else [], 2)):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(module.command, module.__doc__, arguments)
            except SystemExit as end:
                assert end.code == wanted, (name, end.code, err.getvalue())
        if wanted:
            assert err.getvalue().startswith("error: ckpt= is missing") and err.getvalue().count("\\n") == 1, (name, err.getvalue())
        else:
            assert "usage: python -m eval." + name in out.getvalue()
"""
    source = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
