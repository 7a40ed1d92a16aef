"""Evaluation of a trained run, from checkpoint to recorded numbers, and the commands."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval.metrics import evaluate, load, measure
from eval.samples import open_split
from hdm import cli
from hdm.config.axes import OBJECTIVE
from hdm.config.errors import CheckpointError, ConfigError, DataError, HdmError, TrainingError
from hdm.export import __main__ as export
from hdm.track.events import EventLog, read
from hdm.train.checkpoint import load_model
from hdm.train.examples import Examples
from hdm.train.loop import train
from hdm.train.validation import Validation

FID = {"fid/efficientnet", "kid/efficientnet"}
SOURCE = Path(__file__).parents[2]


def metrics(folder):
    return {key: value for event in read(folder) if event.type == "metrics" for key, value in event.data["values"].items()}


def refuse(*_, **__):
    raise AssertionError("images were drawn again")


def command(name, *arguments, capsys):
    """Exit code, stdout and stderr of `python -m eval.NAME`."""
    module = __import__(f"eval.{name}", fromlist=["command"])
    with pytest.raises(SystemExit) as end:
        cli.main(module.command, module.__doc__, arguments)
    out = capsys.readouterr()
    return end.value.code, out.out, out.err


def test_numbers_and_protocol_are_written_and_recorded(trained):
    values = evaluate(trained, ["fid"], recorder=EventLog(trained))
    assert set(values) == FID
    report = json.loads((trained / "eval" / "fid.json").read_text())
    assert report["metrics"] == values
    assert report["samples"] == 8
    assert report["weights"] == "ema-power"
    protocol = report["protocol"]
    assert protocol["samples"] == 20
    assert protocol["size"] == "16x16"
    grid = {"time_shift": 1.0, "resolution": "fixed", "base_tokens": 256}
    assert protocol["sampler"] == {"name": "euler", "steps": 2, **grid}
    assert protocol["guidance"] == {"name": "cfg", "scale": 3.0}
    assert protocol["extractor"]["name"] == "efficientnet"
    assert len(protocol["extractor"]["weights"]) == 64
    assert {key: metrics(trained)[key] for key in FID} == values
    events = read(trained)
    assert {"protocol.fid": report["protocol_digest"]} in [e.data["values"] for e in events if e.type == "tags"]
    assert "eval/fid.json" in [e.data["path"] for e in events if e.type == "artifact"]


def test_images_are_drawn_once_for_all_metrics(trained, monkeypatch):
    first = evaluate(trained, ["fid"])
    monkeypatch.setattr("hdm.diffusion.generate.Generator.images", refuse)
    assert evaluate(trained, ["fid"]) == first
    assert set(evaluate(trained, ["clip"])) == {
        f"alignment/ridge_minilm{part}{suffix}" for part in ("", "_i2t_r5", "_t2i_r5") for suffix in ("", "_real")
    }
    with pytest.raises(AssertionError, match="drawn again"):
        evaluate(trained, ["fid"], overrides=["sampler.steps=3"])


def test_images_do_not_depend_on_the_batch_and_take_the_views_of_the_real_ones(trained):
    from eval.samples import read_images
    from hdm.diffusion.generate import Generator

    evaluate(trained, ["fid"])
    (path,) = (trained / "eval").glob("*/samples-*.safetensors")
    images = load_file(path)["images"]
    assert images.shape == (20, 3, 16, 16)
    loaded = load_model(trained)
    real = read_images(loaded.run, open_split(loaded.run, "val"), 20)
    assert len(set(real.views[:, 3].tolist())) > 1  # crops from several places
    examples = Examples(loaded.run, torch.device("cpu"))
    generator = Generator(
        loaded.model, run=loaded.run, device="cpu", text_encoder=examples.text_encoder, autoencoder=examples.autoencoder
    )
    alone = generator.images([real.captions[7]], size=(16, 16), seed=0, indices=[7], views=real.views[7:8])
    difference = (images[7].float() - (alone[0] + 1) * 127.5).abs().max()
    assert difference <= 0.51


def test_another_protocol_or_checkpoint_gets_names_of_its_own(trained):
    log = EventLog(trained)
    own = evaluate(trained, ["fid"], recorder=log)
    evaluate(trained, ["fid"], overrides=["sampler.steps=3"], recorder=log)
    evaluate(trained, ["fid"], weights="raw", recorder=log)
    evaluate(trained / "checkpoints" / "samples-000000000", ["fid"], recorder=log)
    assert {key: metrics(trained)[key] for key in FID} == own
    reports = {path.name: json.loads(path.read_text()) for path in (trained / "eval").glob("fid*.json")}
    assert len(reports) == 4
    digests = [report["protocol_digest"] for report in reports.values()]
    first = reports["fid.json"]["protocol_digest"]
    assert digests.count(first) == 2  # the run's own, and the initial weights under the same protocol
    assert f"fid.{first}.000000000.json" in reports
    assert f"kid/efficientnet.{first}.000000000" in metrics(trained)
    assert len(metrics(trained).keys() & {f"fid/efficientnet.{d}" for d in digests if d != first}) == 2


def test_images_are_guided_by_another_checkpoint_and_drawn_again_when_it_changes(trained):
    weak = trained / "checkpoints" / "samples-000000000"
    overrides = ["guidance=autoguidance", f"guidance.ckpt={weak}", "guidance.scale=3"]
    evaluate(trained, ["fid"], overrides=overrides)
    (report,) = [json.loads(path.read_text()) for path in (trained / "eval").glob("fid.*.json")]
    assert len(report["protocol"]["guidance"]["ckpt"]) == 16
    evaluate(trained, ["fid"], overrides=[*overrides, f"guidance.ckpt={trained}"])
    assert len(list((trained / "eval").glob("*/samples-*.safetensors"))) == 2


def test_an_average_made_of_snapshots_is_evaluated_and_exported(trained, capsys):
    """weights=ema:0.07 is one network for every command, and another one than those that the run has stored."""
    run = load_model(trained).run
    run = replace(run, ema=replace(run.ema, snapshot_every=4), budget=replace(run.budget, steps=8))
    folder = Path("snapshots")
    train(run, folder, EventLog(folder))
    code, _, err = command("valloss", f"ckpt={folder}", "weights=ema:0.07", capsys=capsys)
    assert code == 0, err
    (report,) = (json.loads(path.read_text()) for path in (folder / "eval").glob("valloss*.json"))
    assert (report["weights"], report["samples"]) == ("ema-0.07", 32)
    export.command([f"ckpt={folder}", "weights=ema:0.07", "format=safetensors", "out=exported"])
    made, file, stored = load_model(folder, weights="ema:0.07"), load_model("exported/model.safetensors"), load_model(folder)
    assert file.weights == made.weights == "ema-0.07"
    parameters = [dict(loaded.model.named_parameters()) for loaded in (made, file, stored)]
    assert all(torch.equal(tensor, parameters[1][name]) for name, tensor in parameters[0].items())
    assert any(not torch.equal(tensor, parameters[2][name]) for name, tensor in parameters[0].items())
    validation = Validation(run, open_split(run, "val"), Examples(run, torch.device("cpu")), OBJECTIVE.build(run.objective))
    assert validation.losses(file.model).mean().item() == pytest.approx(report["metrics"]["loss/velocity"], rel=1e-6)
    card = Path("exported/README.md").read_text()
    assert f"| loss/velocity | {report['metrics']['loss/velocity']:.5g} |" in card
    assert "val/loss" not in card  # of other weights


def test_a_copied_checkpoint_can_be_evaluated(trained, tmp_path):
    (trained / "checkpoints" / "samples-000000008").rename(tmp_path / "copy")
    assert set(evaluate(tmp_path / "copy", ["fid"])) == FID
    assert (tmp_path / "copy" / "eval" / "fid.json").exists()


def test_fewer_held_out_images_than_asked_for_is_said(trained, capsys):
    evaluate(trained, ["fid"], overrides=["eval.samples=500"])
    assert "the val split has 20 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"overrides": ["eval.samples=8"]}, ConfigError, r"eval.samples=8: is too few; ask for 16 or more"),
        ({"metrics": ["prcd"]}, ConfigError, r"no metric 'prcd'; did you mean 'prdc'\?"),
        ({"overrides": ["merge=add"]}, ConfigError, "merge=add: belongs to the trained run"),
        ({"overrides": ["sampler.step=3"]}, ConfigError, "did you mean 'sampler.steps'"),
        ({"weights": "best"}, ConfigError, r"weights=best: no such weights \(options: ema"),
        ({"ckpt": "nowhere"}, CheckpointError, "ckpt=nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(trained, arguments, error, words):
    arguments = {"ckpt": trained, "metrics": ["fid"], **arguments}
    with pytest.raises(error, match=words) as caught:
        evaluate(arguments.pop("ckpt"), arguments.pop("metrics"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_network_that_draws_nan_is_one_line(trained):
    subject = load(trained)
    for parameter in subject.loaded.model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"^20 of 20 images hold NaN or infinite pixels and cannot be measured[^\n]*$"):
        measure(subject, ["kid"])


def test_features_that_are_not_finite_and_too_few_images_are_refused():
    from eval.distribution import _check

    values = np.ones((3, 4))
    with pytest.raises(DataError, match=r"generated images: 1 are too few; ask for more eval\.samples"):
        _check(values[:1], "generated images")
    values[1, 2] = np.nan
    with pytest.raises(DataError, match="real images: 1 have features that are not finite"):
        _check(values, "real images")


def test_a_val_split_of_a_few_images_is_refused(trained, monkeypatch):
    monkeypatch.setattr("eval.metrics.FEWEST", 21)
    with pytest.raises(DataError, match=r"its val split has 20 images; metrics need 21 or more"):
        evaluate(trained, ["kid"], overrides=["eval.samples=30"])


def test_the_command_prints_a_table_and_records(trained, capsys):
    code, out, err = command("fid", f"ckpt={trained}", "sampler.steps=1", capsys=capsys)
    assert code == 0
    assert "kid/efficientnet" in out
    assert "EfficientNet-Lite0, not Inception" in err
    assert any(key.startswith("kid/efficientnet.") for key in metrics(trained))


def test_the_commands_refuse_bad_input_with_code_2(trained, capsys):
    (trained / "checkpoints" / "samples-000000008" / "model.safetensors").write_bytes(b"cut")
    broken = trained / "checkpoints" / "samples-000000008"
    for name in ("fid", "clip"):
        for arguments, words in (
            ([], "ckpt= is missing"),
            (["ckpt=nowhere"], "no such folder"),
            ([f"ckpt={broken}"], "damaged"),
            ([f"ckpt={trained}", "eval.sample=3"], "did you mean 'eval.samples'"),
            ([f"ckpt={trained}", "steps"], "not of the form key=value"),
            ([f"ckpt={trained}", "eval.features=inception", "eval.alignment=clip"], "eval."),
        ):
            code, _, err = command(name, *arguments, capsys=capsys)
            lines = [line for line in err.splitlines() if line.startswith("error:")]
            assert code == 2, (arguments, err)
            assert len(lines) == 1
            assert words in lines[0]


@pytest.mark.parametrize("module", ["eval.fid", "eval.clip", "hdm.sample"])
def test_help_is_quick_and_needs_no_torch(module):
    run = f"runpy.run_module('{module}', run_name='__main__')"
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.modules['torch'] = None; {run}"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module} ckpt=" in done.stdout
    assert time.perf_counter() - began < 5  # 0.1 s on an idle machine


def test_help_names_every_choice():
    from eval import clip, fid
    from eval.extractor import EXTRACTORS
    from hdm.config.schema import Alignment

    assert " | ".join(["auto", *EXTRACTORS.names()]) in fid.__doc__
    assert " | ".join(Alignment) in clip.__doc__


def test_missing_ckpt_is_an_hdm_error():
    from eval.command import run

    with pytest.raises(HdmError, match=r"ckpt= is missing; .*python -m eval.fid ckpt=runs/NAME"):
        run("fid", [])
