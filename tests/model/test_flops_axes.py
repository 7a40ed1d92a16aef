"""Counted FLOPs of the kinds of attention and MLP against closed forms, as the difference to full attention and SwiGLU."""

import math

import pytest

from hdm.config.schema import MODELS, QKNorm
from hdm.model import Architecture
from hdm.model.attention import FullConfig
from hdm.model.flops import count_flops
from hdm.model.linear_attention import LinearConfig
from hdm.model.local_attention import NeighborhoodConfig, WindowConfig
from hdm.model.memory import saved_bytes
from hdm.model.mlp import GegluConfig, MixFfnConfig
from hdm.model.routing import NoneConfig as NoRouting
from hdm.model.routing import TreadConfig

SIZE = MODELS["tiny"]
D = SIZE.dim
BLOCKS = SIZE.pre_depth + SIZE.depth * (SIZE.enc_blocks + SIZE.dec_blocks) + SIZE.post_depth


def counted(grid, text, *, rate=0.0, **fields):
    routing = TreadConfig(rate=rate) if rate else NoRouting()
    return count_flops(Architecture(size=SIZE, routing=routing, **fields), grid=grid, text_tokens=text, rate=rate)


def full(image, text, last):
    return 2 * (image + text) * (image if last else image + text) * D


def local(keys):
    """Each image token reads `keys` of its grid and all text; text reads everything, but not in the last block."""
    return lambda image, text, last: 2 * image * (keys + text) * D + (0 if last else 2 * text * (image + text) * D)


def linear(image, text, last):
    """One sum of outer products over all tokens, each query times it, and each query times the sum of keys."""
    queries = image if last else image + text
    return (image + text) * D * 32 + queries * D * 32 + queries * D


@pytest.mark.parametrize("text", [0, 16])
@pytest.mark.parametrize(
    ("attention", "grid", "macs"),
    [
        (NeighborhoodConfig(), (16, 16), local(49)),
        (NeighborhoodConfig(window=4), (9, 13), local(16)),
        (NeighborhoodConfig(), (5, 24), local(5 * 7)),
        (NeighborhoodConfig(window=64), (16, 16), full),
        (WindowConfig(), (16, 16), local(64)),
        (WindowConfig(window=4), (12, 20), local(16)),
        (WindowConfig(), (6, 16), local(6 * 8)),
        (LinearConfig(), (16, 16), linear),
        (LinearConfig(qk_norm=QKNorm.rms), (9, 13), linear),
        (FullConfig(qkv_bias=True), (9, 13), full),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),  # the same for every worker
)
def test_attention(attention, grid, macs, text):
    n = math.prod(grid)
    expected = sum(macs(n, text, i == BLOCKS - 1) - full(n, text, i == BLOCKS - 1) for i in range(BLOCKS))
    assert counted(grid, text, attention=attention) - counted(grid, text) == 2 * expected


def test_windows_that_do_not_fit_are_counted_with_their_padding():
    """9 x 13 tokens take 2 x 2 windows of 8 x 8, shifted or not."""
    expected = BLOCKS * (2 * 4 * 64 * 64 - 2 * 117 * 117) * D
    assert counted((9, 13), 0, attention=WindowConfig()) - counted((9, 13), 0) == 2 * expected


def test_linear_attention_of_a_part_of_the_tokens():
    """At rate .5 the middle has half of the image tokens; the last of the other blocks has image queries only."""
    inner = SIZE.depth * (SIZE.enc_blocks + SIZE.dec_blocks)
    counts = [(256, 16, i == BLOCKS - inner - 1) for i in range(BLOCKS - inner)] + [(128, 16, False)] * inner
    expected = sum(linear(*count) - full(*count) for count in counts)
    given = {"rate": 0.5}
    assert counted((16, 16), 16, attention=LinearConfig(), **given) - counted((16, 16), 16, **given) == 2 * expected


@pytest.mark.parametrize("text", [0, 16])
@pytest.mark.parametrize(("ratio", "hidden"), [(2.5, 5 * D // 2), (None, SIZE.mlp_dim)])
def test_mlp(ratio, hidden, text):
    """Nine products a channel of the image tokens; the rest is a SwiGLU of another width."""
    tokens = BLOCKS * (256 + text) - text
    expected = tokens * 3 * D * (hidden - SIZE.mlp_dim) + BLOCKS * 256 * 9 * 2 * hidden
    assert counted((16, 16), text, mlp=MixFfnConfig(ratio=ratio)) - counted((16, 16), text) == 2 * expected
    assert counted((16, 16), text, mlp=GegluConfig()) == counted((16, 16), text)


def test_what_a_window_keeps_does_not_grow_with_the_square_of_the_grid():
    """Memory is planned with the tiles that a CPU runs: four times the tokens keep four times the bytes."""
    architecture = Architecture(size=SIZE, routing=NoRouting(), attention=NeighborhoodConfig(), merge=_none())
    small, large = (saved_bytes(architecture, batch=1, grid=grid, text_tokens=0) for grid in ((16, 16), (32, 32)))
    assert 3 * small < large < 5 * small


def _none():
    from hdm.model.merge import NoneConfig

    return NoneConfig()
