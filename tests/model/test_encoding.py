"""Encodings of other systems against diffusers, timm and closed forms (spec 5)."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from nano import CONTEXT, SIZE, inputs, network

from hdm import torchvision_cpu
from hdm.config.axes import ENCODING, POSITION
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import ModelConfig
from hdm.model import Architecture
from hdm.model.attention import attend, rotate
from hdm.model.encoding import (
    AxialRopeConfig,
    CoordChannelsConfig,
    FluxRopeConfig,
    LearnedAbsConfig,
    Order,
    Pairs,
    SincosAbsConfig,
    Spacing,
    TextPosition,
)
from hdm.model.init import initialize
from hdm.model.position import IntegerConfig, Interpolation

torchvision_cpu.declare()
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_2d_sincos_pos_embed  # noqa: E402
from diffusers.models.transformers.transformer_flux import FluxPosEmbed  # noqa: E402
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat, build_sincos2d_pos_embed  # noqa: E402

GRID = (5, 7)
SIZE_128 = dataclasses.replace(ModelConfig(), dim=256, heads=2, head_dim=128)
DRAW = torch.Generator().manual_seed(8)


def integer(grid=GRID, config=None, dtype=torch.float64):
    image = [16 * grid[0], 16 * grid[1]]
    return POSITION.build(config or IntegerConfig())(torch.tensor([[*image, 0, 0, *image]], dtype=dtype), grid)


def encoding(config, size=SIZE_128, square=(-0.5, 15.5)):
    return ENCODING.build(config, size, square)


def turned(config, position, x, size=SIZE_128):
    scheme = encoding(config, size)
    return rotate(x, scheme.rotation(position))


def queries(tokens, size=SIZE_128):
    return torch.randn(1, size.heads, tokens, size.head_dim, generator=DRAW, dtype=torch.float64)


# --- rotary -----------------------------------------------------------------------------------------------------------

EVA = {"fraction": 1.0, "spacing": Spacing.lang, "order": Order.blocks}


@pytest.mark.parity("`encoding=axial_rope`, lang", "timm RotaryEmbeddingCat, angles in float32")
def test_lang_in_blocks_is_the_rotary_encoding_of_eva_in_timm():
    """Integer positions, theta^(-k/K), all channels, y then x (EVA, LightningDiT)."""
    x = queries(GRID[0] * GRID[1])
    theirs = RotaryEmbeddingCat(SIZE_128.head_dim, in_pixels=False, feat_shape=list(GRID), ref_feat_shape=None, temperature=1e4)
    expected = apply_rot_embed_cat(x, theirs.get_embed())
    torch.testing.assert_close(turned(AxialRopeConfig(**EVA), integer(), x), expected, rtol=0, atol=2e-6)  # its angles are fp32


@pytest.mark.parity("`encoding=axial_rope`, each axis", "diffusers apply_rotary_emb, float32")
def test_each_axis_is_the_rotary_encoding_of_diffusers():
    x, position = queries(GRID[0] * GRID[1]), integer()
    got = turned(AxialRopeConfig(**EVA), position, x)
    for axis, part in enumerate(((0, 64), (64, 128))):
        cos_sin = get_1d_rotary_pos_embed(64, position[0, :, axis], use_real=True, freqs_dtype=torch.float64)
        expected = apply_rotary_emb(x[..., slice(*part)], cos_sin)
        torch.testing.assert_close(got[..., slice(*part)], expected, rtol=0, atol=1e-6)  # diffusers rotates in fp32


def test_blocks_and_alternating_pairs_are_one_encoding_of_other_channels():
    """Pair a K + k of one is pair 2k + a of the other: with the channels moved along, logits are equal."""
    position, x, y = integer(), queries(35), queries(35)
    k = SIZE_128.head_dim // 4
    move = [2 * (a * k + i) + part for i in range(k) for a in (0, 1) for part in (0, 1)]
    logits = []
    for order, channels in ((Order.blocks, slice(None)), (Order.alternating, move)):
        config = AxialRopeConfig(**{**EVA, "order": order})
        q, key = (turned(config, position, part[..., channels]) for part in (x, y))
        logits.append(q @ key.transpose(-1, -2))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
    assert not torch.allclose(turned(AxialRopeConfig(**EVA), position, x), turned(AxialRopeConfig(fraction=1.0), position, x))


@pytest.mark.parametrize("size", [SIZE_128, SIZE], ids=["128", "16"])
def test_lang_is_the_same_in_every_head_and_slows_from_one_radian_a_token(size):
    frequencies = encoding(AxialRopeConfig(**EVA), size).log_frequencies().exp()
    k = size.head_dim // 4
    np.testing.assert_allclose(frequencies, np.tile((1e4 ** (-np.arange(k) / k))[:, None], (size.heads, 1, 2)), rtol=1e-12)
    half = encoding(AxialRopeConfig(**EVA), size, square=(-0.5, 0.5)).log_frequencies().exp()
    np.testing.assert_allclose(half, 16 * frequencies, rtol=1e-12)  # 16 tokens a unit of rect1


def test_frequencies_of_hdit():
    """log pi … 10 pi exclusive over n_heads d_rot / 4 values, dealt in turn: 4 heads of 64 channels, half of them rotating."""
    size = dataclasses.replace(ModelConfig(), dim=256, heads=4, head_dim=64)
    hdit = AxialRopeConfig(spacing=Spacing.log_open, low=1.0, high=10.0, order=Order.blocks, pairs=Pairs.half_split)
    got = encoding(hdit, size, square=(-1.0, 1.0)).log_frequencies().exp()
    values = np.exp(np.log(np.pi) + np.log(10) * np.arange(32) / 32)
    assert got.shape == (4, 8, 2)
    for head in range(4):
        for axis in (0, 1):
            np.testing.assert_allclose(got[head, :, axis], values[head::4], rtol=1e-12)
    assert got.max() < 10 * math.pi * 0.94
    x = torch.ones(1, 4, 1, 64, dtype=torch.float64)
    turns = rotate(x, encoding(hdit, size, square=(-1.0, 1.0)).rotation(torch.tensor([[[0.3, 0.4]]], dtype=torch.float64)))
    assert (turns[0, :, 0] != 1).sum(dim=-1).tolist() == [32] * 4


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parity("`encoding.pairs=half_split`", "diffusers apply_rotary_emb, float32")
def test_half_split_pairs_are_those_of_diffusers(fraction):
    config = AxialRopeConfig(**{**EVA, "fraction": fraction, "pairs": Pairs.half_split})
    scheme, position, x = encoding(config), integer(), queries(35)
    assert scheme.halves and not encoding(AxialRopeConfig()).halves
    got = rotate(x, scheme.rotation(position), halves=True)
    channels = int(128 * fraction)
    angle = torch.cat([torch.outer(position[0, :, a], scheme.log_frequencies().exp()[0, :, a]) for a in (0, 1)], dim=-1)
    cos_sin = tuple(torch.cat([f(angle), f(angle)], dim=-1) for f in (torch.cos, torch.sin))
    expected = apply_rotary_emb(x[..., :channels], cos_sin, use_real_unbind_dim=-2)
    torch.testing.assert_close(got[..., :channels], expected, rtol=0, atol=1e-6)
    assert torch.equal(got[..., channels:], x[..., channels:])


def test_half_split_reaches_the_network():
    model, other = (network(encoding=("axial_rope", {"pairs": pairs})) for pairs in Pairs)
    given = inputs(model)
    assert not torch.allclose(given.run(model), given.run(other), atol=1e-4)


@pytest.mark.parity("`encoding=flux_rope`", "diffusers FluxPosEmbed, float32")
def test_flux_is_that_of_diffusers():
    """Three axes of 16, 56 and 56 channels at theta 1e4, ids (0, row, column), text at (0, 0, 0)."""
    scheme, text = encoding(FluxRopeConfig()), 4
    assert scheme.channels == [16, 56, 56]
    position = torch.cat([integer(), torch.zeros(1, text, 2, dtype=torch.float64)], dim=1)
    x = queries(position.shape[1])
    ids = torch.cat([torch.zeros(position.shape[1], 1), position[0]], dim=1)
    expected = apply_rotary_emb(x, FluxPosEmbed(10_000, [16, 56, 56])(ids))
    got = rotate(x, scheme.rotation(position, 35))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert torch.equal(got[:, :, 35:], x[:, :, 35:])


@pytest.mark.parity("`encoding=flux_rope`, text index", "diffusers FluxPosEmbed, float32")
def test_text_index_is_an_axis_of_its_own():
    """Text numbers from 1 on the first axis of Flux's three; image tokens keep 0 there."""
    scheme = encoding(FluxRopeConfig(text=TextPosition.index))
    position = torch.cat([integer(), torch.zeros(1, 4, 2, dtype=torch.float64)], dim=1)
    x = queries(39)
    ids = torch.cat([torch.zeros(39, 1), position[0]], dim=1)
    ids[35:, 0] = torch.arange(1, 5)
    got = rotate(x, scheme.rotation(position, 35))
    torch.testing.assert_close(got, apply_rotary_emb(x, FluxPosEmbed(10_000, [16, 56, 56])(ids)), rtol=0, atol=2e-6)
    assert torch.equal(got[:, :, :35], rotate(x, encoding(FluxRopeConfig()).rotation(position, 35))[:, :, :35])


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 96, 128])
def test_flux_deals_every_channel(head_dim):
    size = dataclasses.replace(ModelConfig(), heads=2, head_dim=head_dim, dim=2 * head_dim)
    scheme = encoding(FluxRopeConfig(), size)
    assert sum(scheme.channels) == head_dim and all(c % 2 == 0 for c in scheme.channels)
    assert scheme.rotation(integer()).shape == (1, 2, 35, head_dim // 2)


@pytest.mark.parametrize("config", [AxialRopeConfig(**EVA), FluxRopeConfig(), AxialRopeConfig(spacing=Spacing.log_open)], ids=str)
def test_attention_sees_only_differences_of_positions(config):
    q, k, v = (queries(35) for _ in range(3))
    scheme = encoding(config)
    a, b = (
        attend(rotate(q, r), rotate(k, r), v, None)
        for r in (scheme.rotation(integer() + torch.tensor(shift)) for shift in ([0.0, 0.0], [3.0, -11.5]))
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- absolute ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "base", "scale"),
    [((16, 16), 16, 1.0), ((32, 32), 16, 1.0), ((64, 64), 64, 2.0), ((24, 40), 32, 2.0), ((5, 7), 16, 1.0)],
)
@pytest.mark.parity("`encoding=sincos_abs`, interpolated", "diffusers get_2d_sincos_pos_embed, float32")
def test_sincos_of_interpolated_numbers_is_pixarts_table_in_diffusers(grid, base, scale):
    """i base / size / scale along each axis, whatever its length."""
    position = integer(grid, IntegerConfig(interpolation=Interpolation.base, base=base, scale=scale))
    got = encoding(SincosAbsConfig(base=base), square=(-0.5, base - 0.5)).embed(position)[0]
    expected = get_2d_sincos_pos_embed(SIZE_128.dim, grid, base_size=base, interpolation_scale=scale)
    torch.testing.assert_close(got, expected.double(), rtol=0, atol=2e-5)  # its grid is fp32


@pytest.mark.parametrize("grid", [(16, 16), (5, 7)])
@pytest.mark.parity("`encoding=sincos_abs`", "timm build_sincos2d_pos_embed, float32")
def test_sincos_of_integers_is_the_table_of_timm(grid):
    """timm's order of the four quarters is sin x, sin y, cos x, cos y."""
    got = encoding(SincosAbsConfig()).embed(integer(grid))[0].unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
    theirs = build_sincos2d_pos_embed(list(grid), SIZE_128.dim, reverse_coord=True).view(grid[1], grid[0], -1).transpose(0, 1)
    torch.testing.assert_close(got, theirs.flatten(0, 1).double(), rtol=0, atol=5e-6)  # its angles are fp32


def test_rope_with_sincos_on_top():
    """LightningDiT adds the table as well; it is that of sincos_abs, and the rotation does not change."""
    both, plain = (encoding(AxialRopeConfig(**EVA, sincos=on)) for on in (True, False))
    position = integer()
    assert plain.embed(position) is None
    assert torch.equal(both.embed(position), encoding(SincosAbsConfig()).embed(position))
    assert torch.equal(both.rotation(position), plain.rotation(position))


@pytest.mark.parametrize("patch", [1, 2])
def test_coord_channels_are_two_more_channels_of_the_convolution(patch):
    size = dataclasses.replace(SIZE, patch=patch)
    scheme = encoding(CoordChannelsConfig(), size, square=(-1.0, 1.0))
    initialize(scheme, 0)
    scheme.double()
    latents = torch.randn(2, 4, 5 * patch, 7 * patch, generator=DRAW, dtype=torch.float64)
    weight = torch.randn(SIZE.dim, 4, patch, patch, generator=DRAW, dtype=torch.float64)
    position = torch.rand(2, 35, 2, generator=DRAW, dtype=torch.float64) * 2 - 1
    map_ = position.view(2, 5, 7, 2).permute(0, 3, 1, 2).repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    conv = torch.nn.functional.conv2d
    whole = conv(torch.cat([latents, map_], dim=1), torch.cat([weight, scheme.weight], dim=1), stride=patch)
    got = conv(latents, weight, stride=patch).flatten(2).transpose(1, 2) + scheme.embed(position)
    torch.testing.assert_close(got, whole.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)
    rect1 = encoding(CoordChannelsConfig(), size, square=(-0.5, 0.5)).double()
    rect1.weight = scheme.weight
    torch.testing.assert_close(rect1.embed(position / 2), scheme.embed(position), rtol=0, atol=1e-12)


def test_learned_vectors_of_text():
    scheme = encoding(LearnedAbsConfig(text=3))
    initialize(scheme, 0)
    assert scheme.text.std().item() == pytest.approx(0.02, rel=0.2)
    got = scheme.embed_text(5)
    assert torch.equal(got[:3], scheme.text) and torch.equal(got[3:], scheme.text[2:].expand(2, -1))
    assert encoding(LearnedAbsConfig()).embed_text(5) is None


def test_text_without_vectors_gets_none():
    for name in ENCODING.names():
        assert encoding(ENCODING.get(name).config()).embed_text(3) is None


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["position=integer", "position.base=8", "encoding=sincos_abs"],
            "encoding.base=16: position.base=8 counts the same tokens",
        ),
        (["position=integer", "position.base=0", "encoding=nope"], "position.base=0: must be above 0"),
        (["position=integer", "position.scale=0", "encoding=nope"], r"position.scale=0.0: must be above 0"),
        (["encoding.theta=0"], r"encoding.theta=0.0: must be above 0"),
        (["encoding=flux_rope", "model.heads=512", "model.head_dim=2"], "head_dim=2: encoding=flux_rope needs a multiple of 4"),
        (["encoding=learned_abs", "encoding.text=-1"], "encoding.text=-1: must be 0 or above"),
        (["encoding.spacing=lang", "encoding.base=0"], "encoding.base=0: must be above 0"),
        (["adaln=scale_only", "adaln.mapping=-1"], "adaln.mapping=-1: must be 0 or above"),
        (["adaln=scale_only", "adaln.width=0"], r"adaln.width=0.0: makes no channels of model.dim=1024; use 3"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else None,
)
def test_what_cannot_be_built_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        compose(overrides)
    assert "\n" not in str(error.value)


def test_published_settings_are_words_on_the_command_line():
    for words in (
        "position=bbox encoding.spacing=log_open encoding.high=10 encoding.order=blocks encoding.pairs=half_split",
        "position=integer encoding.fraction=1 encoding.spacing=lang encoding.order=blocks encoding.sincos=true",
        "position=integer encoding=flux_rope",
        "position=integer position.interpolation=base position.base=64 position.scale=2 encoding=sincos_abs encoding.base=64",
        "encoding=coord_channels position=bbox",
        "encoding=learned_abs encoding.extent=1 encoding.text=77",
    ):
        architecture = Architecture.of(compose(["model=nano", *words.split()]))
        architecture.context_dim = CONTEXT
        assert ENCODING.build(architecture.encoding, architecture.size, (-1.0, 1.0)) is not None
