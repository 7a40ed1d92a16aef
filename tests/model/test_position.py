"""Position maps and encodings against numbers made another way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nano import SIZE

from hdm.config.axes import POSITION
from hdm.model import full_view
from hdm.model.attention import attend, rotate
from hdm.model.encoding import AxialRope, AxialRopeConfig, LearnedAbs, LearnedAbsConfig, SincosAbs, SincosAbsConfig, Spacing
from hdm.model.position import BboxConfig, Edges, IntegerConfig, Interpolation, Origin, Rect1Config

MAPS = [Rect1Config(), Rect1Config(origin=Origin.corner), BboxConfig(), IntegerConfig(base=4)]


def positions(config, view, grid):
    return POSITION.build(config)(torch.as_tensor(view, dtype=torch.float64).view(-1, 6), grid)


def test_rect1_of_a_landscape():
    """H:W = 1:4, so rH = 1/2, rW = 2; 2 x 8 tokens have their centres a quarter apart on both axes."""
    map_ = positions(Rect1Config(), [32, 128, 0, 0, 32, 128], (2, 8)).view(2, 8, 2)
    np.testing.assert_allclose(map_[:, 0, 0], [-0.125, 0.125])
    np.testing.assert_allclose(map_[0, :, 1], np.arange(8) * 0.25 - 0.875)
    corner = positions(Rect1Config(origin=Origin.corner), [32, 128, 0, 0, 32, 128], (2, 8)).view(2, 8, 2)
    np.testing.assert_allclose(corner - map_, torch.tensor([0.25, 1.0]).double().expand(2, 8, 2))


def test_bbox_of_a_portrait():
    map_ = positions(BboxConfig(), [128, 64, 0, 0, 128, 64], (8, 4)).view(8, 4, 2)
    np.testing.assert_allclose(map_[:, 0, 0], np.arange(8) * 0.25 - 0.875)
    np.testing.assert_allclose(map_[0, :, 1], np.arange(4) * 0.25 - 0.375)


def test_integers_are_the_numbers_of_rows_and_columns():
    """Whatever the shape; a crop starts at its first token's number, also when the crop is no whole number of tokens away."""
    map_ = positions(IntegerConfig(), [48, 80, 0, 0, 48, 80], (3, 5))
    assert map_.tolist() == [[[i, j] for i in range(3) for j in range(5)]]
    crop = positions(IntegerConfig(), [96, 80, 24, 16, 64, 64], (4, 4)).view(4, 4, 2)
    np.testing.assert_array_equal(crop[:, 0, 0], [1.5, 2.5, 3.5, 4.5])
    np.testing.assert_array_equal(crop[0, :, 1], [1, 2, 3, 4])


def test_interpolated_numbers_cover_the_base_grid_on_both_axes():
    """i base / size / scale (PixArt): 64 tokens of 1024 px on a base of 64 at scale 2 go in halves, 32 rows in ones."""
    config = IntegerConfig(interpolation=Interpolation.base, base=64, scale=2.0)
    map_ = positions(config, [512, 1024, 0, 0, 512, 1024], (32, 64)).view(32, 64, 2)
    np.testing.assert_array_equal(map_[:, 0, 0], np.arange(32) * 1.0)
    np.testing.assert_array_equal(map_[0, :, 1], np.arange(64) * 0.5)


@given(height=st.integers(16, 2048), width=st.integers(16, 2048))
def test_ranges(height, width):
    """rH rW = 1 under rect1, 4 min / max under bbox, and rH / rW = H / W under both."""
    for config, product in ((Rect1Config(), 1.0), (BboxConfig(), 4 * min(height, width) / max(height, width))):
        map_ = positions(config, [height, width, 0, 0, height, width], (5, 7)).view(5, 7, 2)
        rh, rw = (map_[1, 0, 0] - map_[0, 0, 0]).item() * 5, (map_[0, 1, 1] - map_[0, 0, 1]).item() * 7
        assert rh * rw == pytest.approx(product, rel=1e-9)
        assert rh / rw == pytest.approx(height / width, rel=1e-9)


@given(
    config=st.sampled_from(MAPS),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    data=st.data(),
    token=st.sampled_from([8, 16]),
)
def test_a_crop_has_the_positions_of_the_whole(config, rows, columns, data, token):
    """Spec 14, invariant 5: crop(P) is P of the crop."""
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    h, w = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    image = [rows * token, columns * token]
    whole = positions(config, [*image, 0, 0, *image], (rows, columns)).view(rows, columns, 2)
    crop = positions(config, [*image, top * token, left * token, h * token, w * token], (h, w)).view(h, w, 2)
    torch.testing.assert_close(crop, whole[top : top + h, left : left + w], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
def test_resampled_edges_are_those_of_an_antialiased_map(tokens):
    """The closed form equals torch's own resampling of a map of exact latent pixels (spec 1.3 g: 0.027 at 8 tokens)."""
    config = BboxConfig(edges=Edges.resampled)
    view = [tokens * 16, tokens * 16, 0, 0, tokens * 16, tokens * 16]
    pixels = positions(BboxConfig(), view, (tokens * 2, tokens * 2)).view(1, tokens * 2, tokens * 2, 2).permute(0, 3, 1, 2)
    resampled = F.interpolate(pixels, (tokens, tokens), mode="bilinear", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    got = positions(config, view, (tokens, tokens))
    torch.testing.assert_close(got, resampled, rtol=0, atol=1e-9)
    exact = positions(BboxConfig(), view, (tokens, tokens))
    assert (got - exact).abs().max().item() == pytest.approx(0 if tokens == 1 else 3 / 14 / tokens, abs=1e-9)


# --- rotary -----------------------------------------------------------------------------------------------------------


def test_rotation_is_a_matrix_of_planar_rotations():
    draw = np.random.default_rng(0)
    x, angle = draw.standard_normal((2, 3, 5, 16)), draw.standard_normal((2, 3, 5, 4))
    got = rotate(torch.from_numpy(x), torch.polar(torch.ones(2, 3, 5, 4).double(), torch.from_numpy(angle)))
    for place in np.ndindex(2, 3, 5):
        matrix = np.eye(16)
        for pair, theta in enumerate(angle[place]):
            c, s = np.cos(theta), np.sin(theta)
            matrix[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = [[c, -s], [s, c]]
        np.testing.assert_allclose(got[place], matrix @ x[place], atol=1e-14)


def test_y_and_x_turn_alternate_pairs():
    """Pair 2k + a turns by frequency k times coordinate a (spec 1.3 c)."""
    rope = AxialRope(AxialRopeConfig(), SIZE, (-0.5, 0.5))
    angle = rope.rotation(torch.tensor([[[0.01, 0.02]]])).angle()[0, :, 0]
    frequencies = rope.log_frequencies().exp()[..., 0]
    np.testing.assert_allclose(angle[:, 0::2], 0.01 * frequencies, rtol=1e-5)
    np.testing.assert_allclose(angle[:, 1::2], 0.02 * frequencies, rtol=1e-5)


@pytest.mark.parametrize(("square", "unit"), [((-0.5, 0.5), 2 * math.pi), ((0.0, 1.0), 2 * math.pi), ((-1.0, 1.0), math.pi)])
def test_frequencies_span_one_to_five_turns_of_a_square(square, unit):
    """pi..5 pi under bbox, twice that under rect1, whose range is half (spec 5); all at pi with constant spacing (spec 1.3 f)."""
    frequencies = AxialRope(AxialRopeConfig(), SIZE, square).log_frequencies().exp()
    assert frequencies.shape == (2, 2, 2)
    assert frequencies.min().item() == pytest.approx(unit)
    assert frequencies.max().item() == pytest.approx(5 * unit)
    assert frequencies.unique().numel() == 4  # every head has its own
    ratios = frequencies[..., 0].T.flatten().diff() / frequencies[..., 0].T.flatten()[:-1]
    np.testing.assert_allclose(ratios, ratios[0].expand(3))
    constant = AxialRope(AxialRopeConfig(spacing=Spacing.constant), SIZE, square).log_frequencies().exp()
    np.testing.assert_allclose(constant, unit)


@given(shift=st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
def test_attention_sees_only_differences_of_positions(shift):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 16, generator=draw, dtype=torch.float64) for _ in range(3))
    position = torch.randn(1, 6, 2, generator=draw, dtype=torch.float64)
    rope = AxialRope(AxialRopeConfig(), SIZE, (-0.5, 0.5))
    here, there = rope.rotation(position), rope.rotation(position + torch.tensor(shift, dtype=torch.float64))
    a, b = (attend(rotate(q, r), rotate(k, r), v, None) for r in (here, there))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_text_is_not_turned():
    """Position (0, 0) is the identity, exactly (spec 14, invariant 4)."""
    rotation = AxialRope(AxialRopeConfig(), SIZE, (-0.5, 0.5)).rotation(torch.zeros(1, 3, 2))
    x = torch.randn(1, 2, 3, 16)
    assert torch.equal(rotate(x, rotation), x)


# --- absolute ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MAPS, ids=str)
def test_sincos_is_the_table_of_dit_on_a_square(config):
    """Half of the channels from x, half from y; [sin, cos] of the integer grid at 10000^(-k / (D/4))."""
    size, base = SIZE.dim, 4
    view = [64, 64, 0, 0, 64, 64]
    encoding = SincosAbs(SincosAbsConfig(base=base), SIZE, POSITION.build(config).square)
    got = encoding.embed(positions(config, view, (base, base)))[0].view(base, base, size)
    omega = 10000.0 ** (-np.arange(size // 4) / (size // 4))
    axis = np.concatenate([np.sin(np.outer(np.arange(base), omega)), np.cos(np.outer(np.arange(base), omega))], axis=1)
    for row in range(base):
        for column in range(base):
            np.testing.assert_allclose(got[row, column], np.concatenate([axis[column], axis[row]]), atol=1e-12)


@pytest.mark.parametrize("config", MAPS, ids=str)
def test_learned_table_is_read_cell_by_cell_on_a_square(config):
    encoding = LearnedAbs(LearnedAbsConfig(base=4), SIZE, POSITION.build(config).square).double()
    table = torch.randn(SIZE.dim, 8, 8, dtype=torch.float64)
    encoding.table.data = table
    got = encoding.embed(positions(config, [64, 64, 0, 0, 64, 64], (4, 4)))[0].view(4, 4, -1)
    torch.testing.assert_close(got, table[:, 2:6, 2:6].permute(1, 2, 0), rtol=0, atol=1e-9)


def test_learned_table_between_cells_is_their_mean_and_ends_at_its_border():
    encoding = LearnedAbs(LearnedAbsConfig(base=4), SIZE, (-1.0, 1.0)).double()
    table = torch.randn(SIZE.dim, 8, 8, dtype=torch.float64)
    encoding.table.data = table
    got = encoding.embed(torch.tensor([[[0.0, 0.25], [9.0, -9.0]]], dtype=torch.float64))[0]
    torch.testing.assert_close(got[0], table[:, 3:5, 4].mean(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(got[1], table[:, 7, 0], rtol=0, atol=1e-9)


def test_full_view_is_the_whole_image():
    assert full_view(48, 32, 2).tolist() == [[48, 32, 0, 0, 48, 32]] * 2
