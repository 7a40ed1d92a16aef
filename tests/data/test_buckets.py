"""Bucket tables against the numbers of the systems that they come from (spec 9), and how images find theirs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdm.config.axes import CROP
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.data.buckets import hdm_sizes, nai_table, nearest_ratio, nearest_shape, pixart_table
from hdm.data.crop import ArbConfig, BucketLaw
from hdm.data.order import SQUARE

# Height / width -> (height, width) of the published table for 512 pixels, in full (PixArt-alpha).
PIXART_512 = {
    0.25: (256, 1024), 0.26: (256, 992), 0.27: (256, 960), 0.28: (256, 928), 0.32: (288, 896), 0.33: (288, 864), 0.35: (288, 832),
    0.4: (320, 800), 0.42: (320, 768), 0.48: (352, 736), 0.5: (352, 704), 0.52: (352, 672), 0.57: (384, 672), 0.6: (384, 640),
    0.68: (416, 608), 0.72: (416, 576), 0.78: (448, 576), 0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512), 1.0: (512, 512),
    1.07: (512, 480), 1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448), 1.38: (576, 416), 1.46: (608, 416), 1.67: (640, 384),
    1.75: (672, 384), 2.0: (704, 352), 2.09: (736, 352), 2.4: (768, 320), 2.5: (800, 320), 2.89: (832, 288), 3.0: (864, 288),
    3.11: (896, 288), 3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256), 4.0: (1024, 256),
}  # fmt: skip


@pytest.mark.parametrize(("size", "step", "count"), [(256, 64, 5), (512, 64, 7), (1024, 64, 11), (1024, 16, 39)])
def test_counts_of_the_nai_table(size, step, count):
    """Counted by running the public implementation (spec 9)."""
    table = nai_table(size, step, 2.0)
    assert len(table) == len(set(table)) == count
    assert table == [(width, height) for height, width in reversed(table)]  # mirrored
    assert all(width % step == height % step == 0 and width * height <= size * size for width, height in table)


def test_the_nai_table_of_512_by_hand():
    """512^2 / 576 = 455.1 -> 448, / 640 = 409.6 -> 384, / 704 = 372.4 -> 320, whose ratio 2.2 ends the table."""
    assert nai_table(512, 64, 2.0) == [(704, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (320, 704)]


@pytest.mark.parametrize("scale", [0.5, 1, 1.5, 2])
def test_the_pixart_table_is_the_published_one(scale):
    table = pixart_table(int(512 * scale), int(32 * scale))
    assert len(table) == 40
    assert [(height / scale, width / scale) for width, height in table] == list(PIXART_512.values())


@pytest.mark.parametrize(("size", "step"), [(32, 4), (256, 4), (256, 32), (512, 48)])
def test_the_pixart_table_in_other_steps(size, step):
    """The same shapes, each side within half a step of what is published for the size."""
    table = pixart_table(size, step)
    assert all(width % step == height % step == 0 for width, height in table)
    assert len(table) == len(set(table)) <= 40
    published = [(width * size / 512, height * size / 512) for height, width in PIXART_512.values()]
    for width, height in table:
        assert any(abs(width - w) <= step / 2 and abs(height - h) <= step / 2 for w, h in published)
    assert [bucket for bucket in table if bucket[0] == bucket[1]] == [(round(size / step) * step,) * 2]


def test_images_go_to_pixarts_nearest_ratio():
    """The published rule compares height / width with the ratios rounded to two decimals; only at a border may that differ."""
    table = pixart_table(512, 32)
    generator = np.random.default_rng(0)
    sizes = generator.integers(200, 2000, (2000, 2))
    rounded = np.array(list(PIXART_512))
    theirs = np.abs(rounded[None] - (sizes[:, 1] / sizes[:, 0])[:, None])
    best, second = np.sort(theirs, axis=1)[:, :2].T
    clear = second - best > 0.011
    assert clear.mean() > 0.7
    assert (nearest_ratio(sizes, table) == theirs.argmin(axis=1))[clear].all()


def test_images_go_to_nais_nearest_shape():
    table = nai_table(512, 64, 2.0)
    sizes = np.random.default_rng(1).integers(100, 3000, (500, 2))
    for (width, height), found in zip(sizes, nearest_shape(sizes, table)):
        area = math.sqrt(width * height)
        distances = [math.dist((width / area, height / area), (w / math.sqrt(w * h), h / math.sqrt(w * h))) for w, h in table]
        assert distances[found] == pytest.approx(min(distances), abs=1e-12)
    assert nearest_shape(np.array([[5, 5]]), table)[0] == 3


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([256, 512, 1024]), st.sampled_from([16, 32]))
def test_hdms_law(width, height, size, step):
    """Spec 9: W = X sqrt(ar), H = W / ar, both floored; sides are not swapped."""
    ((w, h),) = hdm_sizes(np.array([[width, height]]), size, step)
    assert w % step == h % step == 0
    exact = size * math.sqrt(width / height), size * math.sqrt(height / width)
    for side, own in zip((w, h), exact):
        assert side == step or side <= own + 1e-6 < side + step + 1e-5
    assert (w - h) * (width - height) >= 0


def test_hdms_law_by_hand():
    assert hdm_sizes(np.array([[100, 100], [400, 100], [1500, 1000], [9, 16]]), 256, 16).tolist() == [
        [256, 256], [512, 128], [304, 208], [192, 336],
    ]  # fmt: skip


@pytest.mark.parametrize("law", BucketLaw)
def test_buckets_of_a_data_set(law):
    sizes = np.array([[512, 512], [600, 400], [400, 600], [0, 0], [900, 100], [100, 900]])
    crop = CROP.build(ArbConfig(size=256, law=law, cutoff=2.0))
    buckets, boxes = crop.assigned(sizes)
    assert buckets.tolist()[3:] == [SQUARE] * 3
    assert boxes[buckets[0]] == (256, 256)
    (tall, wide) = boxes[buckets[2]], boxes[buckets[1]]
    assert tall == wide[::-1]
    assert tall[0] > tall[1]  # boxes are (height, width)
    everyone = CROP.build(ArbConfig(size=256, law=law)).assigned(sizes)[0]
    assert (everyone[4:] == SQUARE).all() == (law is BucketLaw.nai)  # NAI's table ends at 2:1


@pytest.mark.parametrize(("law", "steps"), [("hdm", (16, 8)), ("nai", (64, 8)), ("pixart", (16, 2))])
def test_default_steps(law, steps):
    assert tuple(ArbConfig(size=size, law=BucketLaw(law)).side_step() for size in (256, 32)) == steps


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["crop=arb", "crop.size=250"], "crop.size=250: .*set crop.size=256"),
        (["crop=arb", "crop.step=24"], "crop.step=24: .*set crop.step=32"),
        (["crop=arb", "crop.step=512"], "crop.step=512: .*at most crop.size=256"),
        (["crop=arb", "crop.law=pixart", "crop.size=128"], "crop.step=8: .*set crop.step=16"),
        (["crop=arb", "crop.cutoff=1"], "crop.cutoff=1.0: must be above 1"),
        (["crop=arb", "crop.balanced=0"], "crop.balanced=0: must be above 0"),
        (["crop=arb", "crop.law=nia"], "crop.law"),
        (["crop=patch_diffusion", "crop.full=0.6"], "crop.full=0.6: .*adds up to 1.1, not 1"),
        (["crop=patch_diffusion", "crop.half=-0.1"], "crop.half=-0.1: must be between 0 and 1"),
        (["crop=patch_diffusion", "crop.size=96"], "windows of 96/2 pixels|windows of 96/4 pixels"),
        (["crop=center", "crop.hflip=1.5"], "crop.hflip=1.5: must be between 0 and 1"),
    ],
)
def test_what_cannot_work_is_one_line(overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        compose(["autoencoder.factor=8", "model.patch=2", *overrides])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [["crop=arb"], ["crop=arb", "crop.law=nai"], ["crop=arb", "crop.law=pixart"], ["crop=patch_diffusion"],
     ["crop=patch_diffusion", "crop.size=96", "crop.half=0.5", "crop.quarter=0"], ["crop=center", "crop.hflip=0.5"]],
)  # fmt: skip
def test_one_word_is_enough(overrides):
    compose(["autoencoder.factor=8", "model.patch=2", *overrides])
