"""How images are resized for a network: against the filter's definition in float64, and clean-fid's own resizer.

Parmar et al. (2022) found that filters without antialiasing, and rounding to bytes in between, move FID by more than models differ.
"""

import numpy as np
import pytest
from pictograms import pictograms
from PIL import Image
from torch.nn import functional as F

from eval import efficientnet, vision

SIDE = 40


def cubic(x):
    """Keys' kernel with a = -1/2 (1981, eq. 15)."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def weights(size, side):
    """(side, size): the kernel around each output pixel's centre, widened by the reduction, normalised within the image."""
    scale = size / side
    gap = (np.arange(size) + 0.5) - (np.arange(side)[:, None] + 0.5) * scale
    rows = cubic(gap / max(scale, 1))
    return rows / rows.sum(axis=1, keepdims=True)


def by_definition(pixels, rows=SIDE, columns=SIDE):
    """float64 (N, 3, rows, columns) in [0, 255]."""
    height, width = pixels.shape[2:]
    return (weights(height, rows) @ pixels.double().numpy() @ weights(width, columns).T).clip(0, 255)


def in_bytes(pixels, rows=SIDE, columns=SIDE):
    """The same in two passes, each clipped and rounded to bytes: across and then down, and down and then across."""
    kept = lambda x: x.clip(0, 255).round()  # noqa: E731
    down, across = weights(pixels.shape[2], rows), weights(pixels.shape[3], columns).T
    x = pixels.double().numpy()
    return kept(down @ kept(x @ across)), kept(kept(down @ x) @ across)


@pytest.fixture(scope="module", params=[(24, 24), (96, 96), (96, 61)], ids=["enlarged", "reduced", "not square"])
def pixels(request):
    height, width = request.param
    return pictograms(6, size=96)[0][:, :, :height, :width].contiguous()


def cleaned(pixels, *, bytes_between):
    from cleanfid.resize import make_resizer

    resize = make_resizer("PIL", bytes_between, "bicubic", (SIDE, SIDE))
    return np.stack([resize(image.permute(1, 2, 0).numpy()) for image in pixels]).transpose(0, 3, 1, 2)


def test_the_filter_is_antialiased_bicubic_on_numbers_that_are_not_rounded(pixels):
    found = efficientnet.resized(pixels, SIDE).numpy()
    np.testing.assert_allclose(found, by_definition(pixels), atol=2e-3)  # of 255, in single precision
    np.testing.assert_allclose(found, cleaned(pixels, bytes_between=False), atol=2e-3)


def test_the_filter_on_bytes_is_the_same_in_two_rounded_passes(pixels):
    found = 255 * vision.resized(pixels, SIDE).numpy()
    np.testing.assert_allclose(found, cleaned(pixels, bytes_between=True), atol=1e-4)
    gap = min((np.abs(found - wanted) for wanted in in_bytes(pixels)), key=np.max)  # Pillow takes the cheaper order
    assert gap.max() < 1.01  # a tie that Pillow's integer weights break the other way
    assert (gap > 0.5).mean() < 0.01


def test_a_filter_without_antialiasing_would_be_seen():
    pixels = pictograms(6, size=96)[0]
    coarse = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=False).clamp(0, 255)
    assert np.abs(coarse.numpy() - by_definition(pixels)).mean() > 1
    assert np.abs(coarse.numpy() - by_definition(pixels)).max() > 20


def test_real_crops_are_cut_by_the_same_filter():
    """The window that is resampled at once is the window of the resampled whole."""
    from hdm.data.crop import Center, CenterConfig
    from hdm.data.images import Decoded

    pixels = pictograms(3, size=96)[0][:, :, :, :64]
    for image in pixels:
        source = Decoded(image=Image.fromarray(image.permute(1, 2, 0).numpy()), width=64, height=96)
        found = Center(CenterConfig(size=SIDE))(source, np.random.default_rng(0)).pixels.transpose(2, 0, 1)
        whole = in_bytes(image[None], rows=60)
        assert min(np.abs(found - each[0][:, 10:50]).max() for each in whole) < 1.01
        assert min(np.abs(found - each[0][:, 9:49]).max() for each in whole) > 10
