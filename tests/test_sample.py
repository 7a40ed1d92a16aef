"""`python -m hdm.sample`: the command line, the pictures and the refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdm import cli, sample
from hdm.config.errors import HdmError
from hdm.config.schema import Precision
from hdm.pictures import sheet


def test_prompts_are_taken_as_they_are():
    prompts = ["a red car", 'it\'s a "red" car, {x: 1}', "a=b, size=3x4", "[1,2]", "snow ☃ 雪"]
    request = sample.parse(["ckpt=r", *(f"prompt={p}" for p in prompts), "guidance.scale=2"])
    assert request.prompts == prompts
    assert request.overrides == ["guidance.scale=2"]
    assert request.size is None


def test_options_are_read(tmp_path):
    (tmp_path / "p.txt").write_text("first, with comma\n\n  second  \n")
    request = sample.parse([
        "ckpt=r", "prompts=p.txt", "prompt=zeroth", "n=4", "size=32x48", "seed=7", "camera.x=.25",
        "camera.zoom=1.33", "weights=raw",
    ])  # fmt: skip
    assert request.prompts == ["zeroth", "first, with comma", "second"]
    assert (request.n, request.size, request.seed, request.camera, request.weights) == (4, (32, 48), 7, (0.25, 0.0, 1.33), "raw")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompt=a"], "ckpt= is missing"),
        (["ckpt=r"], "no prompt; add prompt="),
        (["ckpt=r", "prompts=nowhere.txt"], "prompts=nowhere.txt: cannot be read"),
        (["ckpt=r", "prompt=a", "size=32"], "size=32: is not of the form HxW"),
        (["ckpt=r", "prompt=a", "size=32x-4"], "size=32x-4: is not of the form HxW"),
        (["ckpt=r", "prompt=a", "n=0"], "n=0: must be a whole number, 1 or more"),
        (["ckpt=r", "prompt=a", "seed=x"], "seed=x: must be a whole number"),
        (["ckpt=r", "prompt=a", "camera.x=left"], "camera.x=left: must be a number"),
        (["ckpt=r", "prompt=a", "camera.noise=away"], "camera.noise=away: must be still or moved"),
        (["ckpt=r", "prompt=a", "camera.zom=2"], "did you mean 'camera.zoom'"),
        (["ckpt=r", "promt=a"], "did you mean 'prompt'"),
        (["ckpt=r", "prompt=a", "red", "car"], "quote a prompt that holds spaces"),
        (["ckpt=r", "prompt=a", "model.dim=3"], "belongs to the trained run"),
        (["ckpt=r", "prompt=a", "guidanec.scale=3"], "no such key 'guidanec'; did you mean 'guidance'"),
        (["ckpt=r", "prompt=a", "out=x.jpg"], "out=x.jpg: must end in .png"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    with pytest.raises(HdmError) as caught:
        sample.parse(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sheet_shows_every_image_unsmoothed_at_its_place():
    images = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = np.asarray(sheet(images, [f"label {i}" for i in range(5)], columns=2))
    scale = 6  # 16 px enlarged to at least 96
    for i, image in enumerate(images):
        enlarged = image.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
        left = i % 2 * (24 * scale + 8) + 4
        tops = [y for y in range(picture.shape[0] - 16 * scale) if np.array_equal(picture[y : y + 96, left : left + 144], enlarged)]
        assert len(tops) == 1, i


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint of initial weights, as the trainer writes it."""
    return written(tmp_path / "run")


def written(folder, *words):
    """A checkpoint of initial weights, moved so that they predict something."""
    from hdm.config.compose import compose, flatten
    from hdm.model import Architecture, build
    from hdm.train import checkpoint

    run = compose([
        "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1", "model.patch=4",
        "text_encoder=hash", "text_encoder.width=12", "autoencoder=pixel", "crop.size=16", "sampler.steps=2", *words,
    ])  # fmt: skip
    assert run.train.precision is Precision.bf16
    weights = build(Architecture.of(run)).state_dict()
    draw = torch.Generator().manual_seed(0)
    weights = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in weights.items()}
    checkpoint.save(folder, samples=64, tensors={"model": weights}, state={"config": flatten(run), "samples": 64}, keep=1)
    return folder


def draw(folder, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(sample.command, sample.__doc__, [f"ckpt={folder}", *arguments])
    return end.value.code


def test_images_and_sheet_are_written(untrained, capsys):
    assert draw(untrained, "prompt=a, b", "prompt=c", "n=2", "size=16x32", "out=o.png", "train.precision=fp32") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:5] == ["o/0000.png", "o/0001.png", "o/0002.png", "o/0003.png", "o.png"]
    assert "images/s" in out[5]
    pictures = [np.asarray(Image.open(path)) for path in out[:4]]
    assert pictures[0].shape == (16, 32, 3)
    assert not np.array_equal(pictures[0], pictures[1])
    assert draw(untrained, "prompt=a, b", "size=16x32", "out=again.png", "train.precision=fp32") == 0
    assert np.abs(np.asarray(Image.open("again/0000.png")).astype(int) - pictures[0]).max() <= 1  # the same in another batch


def test_by_default_pictures_go_into_the_run_folder(untrained, capsys):
    assert draw(untrained, "prompt=a") == 0
    sheet_path = capsys.readouterr().out.splitlines()[1]
    assert sheet_path.startswith(str(untrained / "samples" / "sample-000000064-"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["size=18x16"], "nearest: 16x16"),
        (["camera.zoom=0"], "zoom above 0"),
        (["guidance=routed", "guidance.rate_cond=0.9"], "must be routed less"),
        (["weights=ema_decay"], "was switched off"),
        (["device=tpu9"], "device=tpu9"),
    ],
)
def test_refusals_are_one_line_with_code_2(untrained, arguments, words, capsys):
    assert draw(untrained, "prompt=a", *arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert words in err[0]


def picture(folder, *arguments):
    words = ["prompt=a", "out=p.png", "train.precision=fp32", "sampler.steps=3"]
    assert draw(folder, *words, *arguments) == 0
    return np.asarray(Image.open("p/0000.png")).astype(int)


def test_another_checkpoint_guides(untrained, tmp_path):
    """With itself as the weak network there is nothing to move away from; with a narrower one there is."""
    narrow = written(tmp_path / "narrow", "model.dim=8", "model.heads=1")
    plain = picture(untrained, "guidance=none")
    auto = ["guidance=autoguidance", "guidance.scale=3"]
    assert np.abs(picture(untrained, *auto, f"guidance.ckpt={untrained}") - plain).max() <= 1
    assert np.abs(picture(untrained, *auto, f"guidance.ckpt={narrow / 'checkpoints' / 'samples-000000064'}") - plain).max() > 10
    assert np.array_equal(picture(untrained, *auto, f"guidance.ckpt={narrow}", "guidance.scale=1"), plain)


def test_the_camera_of_the_command_is_that_of_the_generator(untrained):
    from hdm.config.amend import amend
    from hdm.config.axes import AUTOENCODER, TEXT_ENCODER
    from hdm.diffusion.generate import Camera, Generator, Noise
    from hdm.train.checkpoint import load_model

    loaded = load_model(untrained)
    run = amend(loaded.run, ["train.precision=fp32", "sampler.steps=3"])
    text = TEXT_ENCODER.build(run.text_encoder, cache=Path(run.cache))
    pixels = AUTOENCODER.build(run.autoencoder, cache=Path(run.cache))
    generator = Generator(loaded.model, run=run, device="cpu", text_encoder=text, autoencoder=pixels)
    whole = picture(untrained)
    for words, camera in (
        (["camera.x=0.3"], Camera(x=0.3)), (["camera.y=0.3"], Camera(y=0.3)), (["camera.zoom=2"], Camera(zoom=2.0)),
        (["camera.x=0.3", "camera.noise=moved"], Camera(x=0.3, noise=Noise.moved)),
    ):  # fmt: skip
        expected = (generator.images(["a"], size=(16, 16), seed=0, camera=camera)[0] + 1) * 127.5
        found = picture(untrained, *words)
        assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1.0
        assert np.abs(found - whole).max() > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance=autoguidance"], "guidance.ckpt is missing"),
        (["guidance=autoguidance", "guidance.ckpt=nowhere"], "guidance.ckpt=nowhere: no such folder"),
        (["guidance=autoguidance", "guidance.ckpt=other"], "guidance.ckpt=other: its text_encoder.width is 16, this run's 12"),
        (["guidance=autoguidance", "guidance.ckpt=other", "guidance.weights=ema_decay"], "was switched off"),
    ],
)
def test_another_checkpoint_that_does_not_fit_is_refused_in_one_line(untrained, words, message, capsys):
    written(Path("other"), "text_encoder.width=16")
    assert draw(untrained, "prompt=a", *words) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]
