"""The diffusers pipeline: loaded in another process, somewhere else, it draws what our sampler draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdm import torchvision_cpu
from hdm.config.amend import amend
from hdm.config.axes import AUTOENCODER, TEXT_ENCODER
from hdm.config.lines import REPOSITORY
from hdm.diffusion.generate import Camera, Generator
from hdm.export import __main__ as export
from hdm.train.checkpoint import load_model

CLOSE = 1e-5  # pixels in [0, 1]; float32 rounding over a few steps
PROMPTS = ["red square", "a blue one"]


@pytest.fixture(scope="module")
def diffusers():
    torchvision_cpu.declare()
    import diffusers

    return diffusers


def ours(folder, *overrides, size=(16, 16), seed=0, camera=None):
    """What `python -m hdm.sample` draws, in [0, 1]."""
    loaded = load_model(folder)
    run = amend(loaded.run, ["train.precision=fp32", *overrides])
    cache = Path(run.cache)
    text, pixels = TEXT_ENCODER.build(run.text_encoder, cache=cache), AUTOENCODER.build(run.autoencoder, cache=cache)
    generator = Generator(loaded.model, run=run, device="cpu", text_encoder=text, autoencoder=pixels)
    return (generator.images(PROMPTS, size=size, seed=seed, camera=camera or Camera()) + 1) / 2


def pipeline(folder, diffusers, monkeypatch, *options):
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    export.command([f"ckpt={folder}", "format=diffusers", f"out={folder / 'pipe'}", *options])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "pipe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_fresh_process_elsewhere_draws_the_same(written, tmp_path):
    folder = written()
    export.command([f"ckpt={folder}", "format=diffusers", "out=pipe"])
    (tmp_path / "elsewhere").mkdir()
    code = f"""
from hdm import torchvision_cpu
torchvision_cpu.declare()  # for a CPU build of torch beside the index's torchvision; elsewhere it does nothing
from diffusers import DiffusionPipeline
import torch
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r}, trust_remote_code=True)
torch.save(pipe({PROMPTS!r}, seed=3, height=16, width=24, output_type="pt").images, "images.pt")
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "elsewhere" / "images.pt", weights_only=True)
    expected = ours(folder, size=(16, 24), seed=3)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE)


def test_the_command_shows_both_pictures_and_their_difference(written, monkeypatch, capsys):
    folder = written("sampler=heun")  # of which the pipeline makes Euler
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    export.command([f"ckpt={folder}", "format=diffusers", "out=pipe", *(f"compare={prompt}" for prompt in PROMPTS)])
    path, said = capsys.readouterr().out.splitlines()[-2:]
    assert said.startswith("largest difference of a pixel")
    assert float(said.rpartition(" ")[2]) < CLOSE
    shown = np.asarray(Image.open(path).convert("RGB"), float) / 255  # tiles of 16 pixels, shown six times as large
    left, right = shown[4:100, 4:100], shown[4:100, 108:204]
    expected = ours(folder, "sampler=euler", "sampler.steps=3")[0].permute(1, 2, 0).numpy()
    assert abs(left[::6, ::6] - expected).max() <= 0.5 / 255 + CLOSE
    assert abs(left - right).max() <= 1 / 255 + CLOSE
    assert left.std() > 0.1


@pytest.mark.parametrize("backbone", ["uvit", "dit", "mmdit"])
def test_any_backbone_and_its_own_axes(written, diffusers, monkeypatch, backbone):
    folder = written(f"backbone={backbone}", "model.post_depth=1")
    pipe = pipeline(folder, diffusers, monkeypatch)
    torch.testing.assert_close(pipe(PROMPTS, seed=0, output_type="pt").images, ours(folder), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "lines",
    [
        ["sampler.time_shift=3.0"],
        ["sampler.resolution=sqrt", "sampler.base_tokens=4"],
        ["guidance=none"],
        ["guidance=interval", "guidance.scale=2"],
        ["guidance=cfg_zero_star"],
        ["guidance=routed"],
    ],
    ids="+".join,
)
def test_grids_and_guidance_of_the_run(written, diffusers, monkeypatch, lines):
    """With a static shift of its own, diffusers' scheduler would apply it twice (spec 11)."""
    folder = written()
    pipe = pipeline(folder, diffusers, monkeypatch, *lines)
    torch.testing.assert_close(pipe(PROMPTS, seed=0, output_type="pt").images, ours(folder, *lines), rtol=0, atol=CLOSE)


def test_an_objective_that_predicts_the_image(written, diffusers, monkeypatch):
    folder = written("objective=x_prediction")
    pipe = pipeline(folder, diffusers, monkeypatch)
    torch.testing.assert_close(pipe(PROMPTS, seed=0, output_type="pt").images, ours(folder), rtol=0, atol=CLOSE)


def test_what_a_call_can_say(written, diffusers, monkeypatch):
    folder = written()
    pipe = pipeline(folder, diffusers, monkeypatch)

    def draw(prompt=PROMPTS, **options):
        return pipe(prompt, output_type="pt", **{"seed": 0, **options}).images

    plain = draw()
    close = {"rtol": 0, "atol": CLOSE}
    torch.testing.assert_close(draw(num_inference_steps=5), ours(folder, "sampler.steps=5"), **close)
    torch.testing.assert_close(draw(guidance_scale=1.5), ours(folder, "guidance.scale=1.5"), **close)
    camera = {"camera_x": 0.2, "camera_y": -0.1, "camera_zoom": 1.5}
    torch.testing.assert_close(draw(**camera), ours(folder, camera=Camera(x=0.2, y=-0.1, zoom=1.5)), **close)
    torch.testing.assert_close(draw(negative_prompt=""), plain, **close)
    assert (draw(negative_prompt="ugly") - plain).abs().max() > 1e-3
    assert (draw(negative_prompt=["", "ugly"])[0] - plain[0]).abs().max() < CLOSE

    twice = draw(PROMPTS[0], num_images_per_prompt=2)
    assert twice.shape[0] == 2
    torch.testing.assert_close(twice[0], plain[0], **close)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given = draw(seed=None, latents=noise)
    torch.testing.assert_close(draw(seed=None, generator=torch.Generator().manual_seed(1)), given, **close)
    assert pipe(PROMPTS, seed=0).images[0].size == (16, 16)
    assert pipe(PROMPTS, seed=0, output_type="np").images.shape == (2, 16, 16, 3)
    latent = pipe(PROMPTS, seed=0, output_type="latent", return_dict=False)[0]
    torch.testing.assert_close((latent.clamp(-1, 1) + 1) / 2, plain, **close)

    seen = []

    def callback(pipe, step, timestep, given):
        seen.append((step, float(timestep), given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else {}

    assert torch.equal(draw(callback_on_step_end=callback), torch.full_like(plain, 0.5))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [round(t, 3) for _, t, _ in seen] == [1000.0, 666.667, 333.333]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latents": torch.zeros(1)}, "latents of shape"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 texts for 2 prompts"),
        ({"output_type": "jpeg"}, "must be pil, np, pt or latent"),
        ({"height": 18}, "nearest: 16x16"),
    ],
)
def test_what_a_call_cannot_say(written, diffusers, monkeypatch, options, words):
    pipe = pipeline(written(), diffusers, monkeypatch)
    with pytest.raises(Exception, match=words):
        pipe(PROMPTS, **options)


def test_the_folder_alone_says_what_it_is(written):
    """Standard components for diffusers' own tools, nothing of this machine, and no weights but safetensors."""
    folder = written("out=/somewhere/private")
    export.command([f"ckpt={folder}", "format=diffusers", "out=pipe"])
    index = json.loads(Path("pipe/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "HDMPipeline"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["vae"] == [None, None]
    files = [path for path in Path("pipe").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".py", ".md", ".safetensors", ".png"}
    assert not any(b"/somewhere/private" in path.read_bytes() for path in files)


def test_without_the_laboratory_it_says_what_is_missing(written):
    export.command([f"ckpt={written()}", "format=diffusers", "out=pipe"])
    block = "import sys\nsys.modules['hdm.export.pipeline'] = None\n"
    code = block + Path("pipe/pipeline.py").read_text()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "this pipeline needs HDM-Lab" in done.stderr
