"""The sampling engine: the same images whatever the number of processes, the batch, or what was there already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eval import samples, sampling
from eval.metrics import draw, evaluate, load
from eval.pictures import Pictures
from eval.samples import CaptionedImages, to_bytes
from eval.sampling import Remembered, groups
from hdm.config.errors import DataError, TrainingError
from hdm.config.schema import Metric
from hdm.diffusion import batching

SOURCE = Path(__file__).parents[2]


def images(pictures):
    return torch.cat(list(pictures.parts()))


def drawn(folder, *overrides):
    return images(draw(load(folder, overrides=overrides))[0].pictures)


@pytest.fixture
def small_groups(monkeypatch):
    """Five groups of 4 instead of one of 20."""
    monkeypatch.setattr(samples, "GROUP", 4)


# --- what is drawn together -------------------------------------------------------------------------------------------


def captioned(count):
    views = torch.arange(count * 6.0).view(count, 6)
    pixels = Pictures([torch.zeros(min(4, count - i), 3, 8, 8, dtype=torch.uint8) for i in range(0, count, 4)])
    return CaptionedImages(pixels=pixels, views=views, captions=[str(i) for i in range(count)])


def test_every_caption_is_drawn_once_then_again_with_other_noise():
    found = groups(captioned(6), 15)
    assert [len(group.keys) for group in found] == [4, 2, 4, 2, 3]
    assert [caption for group in found for caption in group.captions] == [str(i % 6) for i in range(15)]
    assert [key for group in found for key in group.keys] == list(range(15))
    assert torch.equal(torch.cat([group.views for group in found]), captioned(6).views[[i % 6 for i in range(15)]])
    assert groups(captioned(6), 3)[0].keys == [0, 1, 2]


def test_batches_do_not_depend_on_the_parts_and_keep_sizes_apart():
    pixels = torch.randint(0, 255, (11, 3, 4, 6), dtype=torch.uint8)
    other = torch.randint(0, 255, (3, 3, 6, 4), dtype=torch.uint8)
    for cuts in ((11,), (1, 10), (4, 4, 3)):
        pictures = Pictures([*pixels.split(list(cuts)), other])
        assert [tuple(batch.shape[::2]) for batch in pictures.batches(4)] == [(4, 4), (4, 4), (3, 4), (3, 6)]
        assert torch.equal(torch.cat(list(pictures.batches(4))[:3]), pixels)
        assert pictures.digest == Pictures([pixels, other]).digest
    assert Pictures([pixels]).digest != Pictures([pixels.view(11, 3, 6, 4)]).digest
    assert torch.equal(torch.stack(Pictures(list(pixels.split(4))).take([9, 0, 5])), pixels[[9, 0, 5]])
    assert len(Pictures(list(pixels.split(4))).first(6)) == 6


# --- the same images, always ------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on(trained, small_groups, monkeypatch):
    """Stopped in the third group; then one file is cut short, as by a full disk. What is whole is not drawn again."""
    whole = drawn(trained)
    paths = sorted((trained / "eval").glob("*/samples-*.safetensors"))
    assert len(paths) == 5
    for path in paths[2:]:
        path.unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    kept = paths[0].stat().st_mtime_ns
    calls = []
    original = sampling.Engine.draw

    def counted(self, group, *args, **kwargs):
        calls.append(group.keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, group, *args, **kwargs)

    monkeypatch.setattr(sampling.Engine, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        drawn(trained)
    assert torch.equal(drawn(trained), whole)
    assert [keys[0] for keys in calls] == [4, 8, 12, 12, 16]
    assert paths[0].stat().st_mtime_ns == kept
    assert not list((trained / "eval").glob("*/*.lock"))


def test_batch_size_moves_no_byte(trained, monkeypatch):
    """The network sees three images at a time, of a group of twenty, whatever the user asks to be held."""
    monkeypatch.setattr(batching, "CPU_TOKENS", 3 * 16)
    whole = drawn(trained)
    for size in (1, 2, 7, 64, 1000):
        for path in (trained / "eval").glob("*/samples-*"):
            path.unlink()
        assert torch.equal(drawn(trained, f"sampling.batch_size={size}"), whole), size


@pytest.mark.slow
def test_two_processes_share_the_work_and_draw_what_one_draws(trained, small_groups):
    whole = drawn(trained)
    (folder,) = (trained / "eval").glob("*/")
    for path in folder.glob("samples-*"):
        path.rename(path.with_suffix(".alone"))
    script = (
        "import eval.samples; eval.samples.GROUP = 4\n"
        "from eval.metrics import draw, load\n"
        "import eval.sampling as s; original = s.Engine.draw\n"
        "def told(self, group, *a, **k): print('drew', group.keys[0], flush=True); return original(self, group, *a, **k)\n"
        f"s.Engine.draw = told; draw(load({str(trained)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**environment, "RANK": str(rank)}, cwd=os.getcwd()
        )
        for rank in (0, 1)
    ]
    told = [process.communicate()[0].decode().split("drew ")[1:] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(int(line.split()[0]) for lines in told for line in lines) == [0, 4, 8, 12, 16]  # each group once
    again = torch.cat([load_file(path)["images"] for path in sorted(folder.glob("samples-*.safetensors"))])
    assert torch.equal(again, whole)


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process_however_far_it_had_come(trained):
    """Of `-m eval.all` with another batch size and more threads, after two of five groups: all numbers and protocols are equal."""
    options = ["eval.samples=100", "eval.repeat=true", "eval.bootstrap=5"]
    measured = [m for m in Metric if m not in (Metric.fd, Metric.fd_dinov2, Metric.cmmd, Metric.preference)]
    alone = evaluate(trained, [m.value for m in measured], overrides=options)
    reports = {path.name: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    images = sorted((trained / "eval").glob("*/samples-*.safetensors"))
    assert len(images) == 5
    features = list(Path("cache").glob("features/*.safetensors"))
    assert len(features) >= 3
    for path in [*images[2:], *(trained / "eval").glob("*.json"), *features]:
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "eval.all"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [*command, f"ckpt={trained}", *options, "sampling.batch_size=3"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again = {path.name: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    assert again.keys() >= reports.keys() - {next(name for name in reports if name.startswith("kid"))}
    for name in again:
        assert again[name] == reports[name], name
    found = {name: value for report in again.values() for name, value in report["metrics"].items()}
    assert found == {name: alone[name] for name in found}
    assert {name.partition("/")[0] for name in found} >= {"fid", "kid", "precision", "alignment", "loss", "memorisation"}


def test_whole_images_keep_their_aspect_ratios(trained):
    found, protocol = draw(load(trained, overrides=["eval.whole=true"]))
    assert {tuple(part.shape[2:]) for part in found.pictures.parts()} == {part[1:] for part in found.real.sizes}
    assert any(height != width for _, height, width in found.real.sizes)
    assert protocol["size"] == "whole images of about 16x16"


def test_captions_go_round_when_more_images_are_wanted(trained):
    found, protocol = draw(load(trained, overrides=["eval.samples=50", "eval.repeat=true"]))
    pixels = images(found.pictures)
    assert found.count == protocol["samples"] == 50
    assert found.captions[20:40] == found.captions[:20] == found.real.captions
    assert not torch.equal(pixels[:20], pixels[20:40])  # other noise


def test_text_is_encoded_once():
    class Encoder:
        calls = 0

        def encode(self, captions):
            self.calls += 1
            return torch.zeros(len(captions), 2, 3), torch.ones(len(captions), 2)

    encoder = Encoder()
    remembered = Remembered(encoder)
    for captions in (["a", "b"], [""], ["a", "b"], [""]):
        assert remembered.encode(captions)[0].shape[0] == len(captions)
    assert encoder.calls == 2


# --- bad images -------------------------------------------------------------------------------------------------------


def test_images_that_are_not_finite_are_refused():
    pixels = torch.zeros(3, 3, 4, 4)
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"^1 of 3 images hold NaN .*weights=raw[^\n]*$"):
        to_bytes(pixels)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"2x8x8x3 .*channels stand last, permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "2x1x8x8 and type uint8"),
        (torch.zeros(2, 3, 8, 8), "float32.*to_bytes"),
        (torch.full((2, 3, 8, 8), torch.nan), "hold NaN"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "3x8x8"),
    ],
)
def test_what_is_no_set_of_rgb_bytes_is_refused(pixels, words):
    with pytest.raises(DataError, match=words) as caught:
        Pictures.of(pixels)
    assert "\n" not in str(caught.value)
