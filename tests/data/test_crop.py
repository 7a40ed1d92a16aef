import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import encoded, picture

from hdm.config.axes import CROP
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data.crop import CenterConfig, ShiftedSquareConfig
from hdm.data.images import decode, resized

SHAPES = [(97, 40), (40, 97), (64, 64), (300, 33), (20, 31)]


def cut(data: bytes, size: int, seed: int, config=ShiftedSquareConfig):
    return CROP.build(config(size=size))(decode(data, size), np.random.default_rng(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_crop_is_a_slice_of_the_resized_whole(shape, seed):
    image = picture(*shape, seed)
    crop = cut(encoded(image), 32, seed)
    height, width, top, left, h, w = crop.view
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(whole[top : top + h, left : left + w] - crop.pixels).max() <= 1  # rounding between the two passes
    assert crop.aspect == pytest.approx(math.log(shape[0] / shape[1]))


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([8, 32, 48]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_view_closed_form(width, height, size, seed):
    crop = cut(encoded(Image.new("RGB", (width, height))), size, seed)
    full_height, full_width, top, left, h, w = crop.view
    assert (h, w) == (size, size) == crop.pixels.shape[:2]
    assert min(full_height, full_width) == size
    long = size * max(width, height) / min(width, height)
    assert abs(max(full_height, full_width) - long) <= 0.5
    assert 0 <= top <= full_height - size
    assert 0 <= left <= full_width - size
    assert min(top, left) == 0


def test_offsets_are_uniform_over_both_ends():
    data = decode(encoded(picture(40, 32)), 32)
    crop = CROP.build(ShiftedSquareConfig(size=32))
    lefts = [crop(data, np.random.default_rng(i)).view[3] for i in range(4500)]
    counts = np.bincount(lefts, minlength=9)
    assert len(counts) == 9  # 0 … 40 - 32, the last one included (spec 1.3 u)
    assert np.abs(counts - 500).max() < 6 * math.sqrt(4500 / 9 * 8 / 9)


def test_center_ignores_the_draw():
    crops = [cut(encoded(picture(40, 20)), 20, seed, CenterConfig) for seed in range(5)]
    assert {crop.view for crop in crops} == {(20, 40, 0, 10, 20, 20)}


def test_small_images_are_enlarged():
    crop = cut(encoded(picture(10, 8)), 32, 0)
    assert crop.view[:2] == (32, 40)


def test_jpeg_at_reduced_scale_keeps_geometry_and_detail():
    image = picture(1001, 667, seed=5)
    crop = cut(encoded(image, "JPEG"), 64, 1)
    height, width, top, left, _, _ = crop.view
    assert (width, height) == resized(1001, 667, 64) == (96, 64)
    assert crop.aspect == pytest.approx(math.log(1001 / 667))
    whole = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC), np.float64)
    error = np.mean((whole[top : top + 64, left : left + 64] - crop.pixels) ** 2)
    assert 10 * math.log10(255**2 / error) > 35


def test_orientation_of_a_camera():
    image = picture(60, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture is to be turned by a quarter
    data = io.BytesIO()
    image.save(data, "JPEG", exif=exif)
    crop = cut(data.getvalue(), 30, 0)
    assert crop.view[:2] == (60, 30)
    assert crop.aspect == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_every_mode_becomes_rgb_on_white(mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0)) if mode in {"RGBA", "P"} else Image.new(mode, (20, 20))
    if mode == "LA":
        image = Image.new("LA", (20, 20), (0, 0))
    if mode == "P":
        image = image.quantize()
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    pixels = np.asarray(decode(data, 20).image)
    assert pixels.shape == (20, 20, 3)
    expected = 255 if mode in {"RGBA", "LA", "P", "CMYK"} else 0  # transparent, or without ink
    assert (pixels == expected).all()


def test_sixteen_bits_of_grey_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(grey)), 16).image)
    assert (pixels == (np.arange(256).reshape(16, 16, 1))).all()


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture(30, 30))[:200], encoded(picture(200, 200), "JPEG")[:900]])
def test_undecodable(data):
    with pytest.raises(DataError, match="image") as error:
        decode(data, 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "patch", "remedy"), [(30, 4, 32), (0, 4, 4), (-16, 2, 2), (250, 32, 256)])
def test_sizes_that_do_not_fit(size, patch, remedy):
    keys = ["autoencoder=pixel", f"model.patch={patch}"]
    with pytest.raises(ConfigError, match=rf"crop.size={size}: .*set crop.size={remedy}"):
        compose([*keys, f"crop.size={size}"])
    assert compose([*keys, f"crop.size={remedy}"]).crop.size == remedy
