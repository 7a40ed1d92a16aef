"""Registration on known movements of real images."""

import numpy as np
import pytest
import torch
from pictograms import pictograms
from PIL import Image

from eval.registration import common_displacement, displacement, zoom


def windows(pixels, top, left, size):
    return pixels[:, :, top : top + size, left : left + size]


@pytest.fixture(scope="module")
def emoji():
    return pictograms(12, size=96)[0]


@pytest.mark.parametrize("moved", [(0, 0), (3, 0), (0, -5), (-6, 4), (9, 9)])
def test_whole_pixels_between_windows_of_one_picture(emoji, moved):
    """What leaves the window on one side and enters on the other is as between crops: only the middle is the same."""
    before, after = windows(emoji, 16, 16, 64), windows(emoji, 16 - moved[0], 16 - moved[1], 64)
    found = displacement(before, after)
    assert np.median(np.abs(found - moved).max(axis=1)) < 0.3
    assert np.abs(common_displacement(before, after) - moved).max() < 0.3


def test_fractions_of_a_pixel(emoji):
    """Windows of a picture at four times the size: 3 of its pixels are 0.75 of ours."""

    def small(top, left):
        tiles = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in emoji]
        box = (left / 4, top / 4, left / 4 + 48, top / 4 + 48)
        shrunk = [np.asarray(tile.resize((48, 48), Image.Resampling.BICUBIC, box=box)) for tile in tiles]
        return torch.from_numpy(np.stack(shrunk)).permute(0, 3, 1, 2)

    found = displacement(small(40, 40), small(37, 46))
    assert np.median(np.abs(found - (0.75, -1.5)).max(axis=1)) < 0.2


def test_unrelated_pictures_have_no_common_displacement(emoji):
    same = displacement(windows(emoji, 16, 16, 64), windows(emoji, 12, 16, 64))
    other = displacement(windows(emoji, 16, 16, 64), windows(emoji.flip(0), 12, 16, 64))
    near = lambda found: (np.abs(found - (4, 0)).max(axis=1) < 1).mean()  # noqa: E731
    assert near(same) > 0.8
    assert near(other) < 0.3


@pytest.mark.parametrize("factor", [0.75, 1.0, 1.5])
def test_zoom_about_the_middle(emoji, factor):
    half = 24
    tiles = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in emoji]

    def seen(zoomed):
        box = (48 - half / zoomed, 48 - half / zoomed, 48 + half / zoomed, 48 + half / zoomed)
        return torch.from_numpy(np.stack([np.asarray(t.resize((48, 48), Image.Resampling.BICUBIC, box=box)) for t in tiles]))

    before, after = seen(1.0).permute(0, 3, 1, 2), seen(factor).permute(0, 3, 1, 2)
    assert np.median(zoom(before, after)) == pytest.approx(factor, rel=0.04)
