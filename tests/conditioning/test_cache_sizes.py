"""Sizes of caches: by hand, against the report's, and against a cache that was made (tests/train/test_cached_training.py)."""

import pytest

from hdm.conditioning.sizes import cache_notes, latent_bytes, report_bytes, text_bytes
from hdm.config.compose import compose, stage_run


@pytest.fixture(scope="module")
def full():
    return compose(["experiment=xut_base_full"])


def test_the_report_counts_twelve_terabytes(full):
    """Spec 1.3 t: 7.6 M images of 0.52 MB of f8c16 latent at 1024 px and 1.05 MB of 512 x 1024 text, 16 bits each."""
    last = stage_run(full, full.stages[-1])
    assert report_bytes(last) == 128 * 128 * 16 * 2 + 512 * 1024 * 2 == 524_288 + 1_048_576
    assert 7_624_704 * report_bytes(last) == pytest.approx(12e12, rel=0.001)
    assert list(cache_notes(full))[-1].endswith("images of the first): 11.99 TB")


def test_stage_by_stage(full):
    latents, text, _ = cache_notes(full)
    images = [7_624_704, 8_469_000, 8_469_000, 3_649_000]
    sizes = [n * 2 * 4 * (side // 8) ** 2 * 2 / 1e12 for n, side in zip(images, (256, 512, 768, 1024))]  # mean and std, bf16
    assert latents == (
        f"autoencoder.cache=none; on the disk it takes {' + '.join(f'{size:.2f} TB' for size in sizes)} = {sum(sizes):.2f} TB"
        " (mean and std of 1 crop an image)"
    )
    captions = [n * tokens * 1024 * 2 / 1e12 for n, tokens in zip(images, (256, 256, 256, 512))]
    assert f"{' + '.join(f'{size:.2f} TB' for size in captions)} = {sum(captions):.2f} TB (one caption an image" in text
    assert captions[0] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(
    ("lines", "latents", "text"),
    [
        (["autoencoder=kl", "crop.size=64", "text_encoder=qwen3"], 2 * 4 * 8 * 8 * 2, 256 * 1024 * 2),
        (["autoencoder=kl", "crop.size=64", "crop.places=4", "autoencoder.cache=fp32"], 2 * 4 * 8 * 8 * 4, 256 * 1024 * 2),
        (["autoencoder=dc_ae", "model.patch=1", "crop.size=256", "text_encoder=clip"], 32 * 8 * 8 * 2, 77 * 768 * 2),
        (["autoencoder=pixel", "text_encoder=hash"], 0, 0),
    ],
)
def test_bytes_of_one(lines, latents, text):
    run = compose(lines)
    assert (latent_bytes(run), text_bytes(run)) == (latents, text)


def test_nothing_is_said_where_the_number_of_images_is_not_known():
    assert list(cache_notes(compose(["experiment=openmoji_nano"]))) == []


def test_crops_multiply():
    (latents, _) = cache_notes(compose(["stages=[{name:a,images:1000,epochs:1}]", "crop.size=256", "crop.places=4"]))
    assert latents.startswith(
        f"autoencoder.cache=none; on the disk it takes {1000 * 4 * 16384 / 1e9:.3g} GB (mean and std of 4 crops"
    )
