"""FLOPs counted on the meta device against a closed form, and against the compute anchor of spec 1.4."""

import dataclasses

import pytest

from hdm.config.schema import MODELS, QKNorm
from hdm.model import Architecture
from hdm.model.adaln import HyperConfig, SharedConfig
from hdm.model.attention import FullConfig
from hdm.model.flops import count_flops
from hdm.model.merge import AddConfig, ConcatConfig, CrossConfig, LerpConfig, MpCatConfig, MpSumConfig
from hdm.model.mlp import GeluConfig
from hdm.model.norm import LayerConfig


def macs(size, n, text, rate=0.0, *, context=1024, merge_extra=None, heads=3, trim=True) -> int:
    """Multiply-adds of one image: matrix products and attention. `merge_extra(t)` replaces the cross-attention of a merge."""
    d, m = size.dim, size.mlp_dim

    def block(t, q=None):
        q = t if q is None else q
        return 3 * d * d * t + 2 * t * q * d + d * d * q + 3 * d * m * q

    def cross(t):
        return 4 * d * d * t + 2 * t * t * d

    full, inner = n + text, n - int(n * rate) + text
    blocks = size.pre_depth * block(full) + size.depth * (size.enc_blocks + size.dec_blocks) * block(inner)
    blocks += (size.post_depth - 1) * block(full) + block(full, n if trim else None)
    merges = size.depth * (merge_extra or cross)(inner)
    ends = n * 16 * d * 2 + text * context * d
    return blocks + merges + ends + d * d + (d + d * d) + heads * 16 * d * d


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.3])
@pytest.mark.parametrize(("name", "grid", "text"), [("base", (16, 16), 256), ("tiny", (12, 20), 77), ("nano", (8, 8), 1)])
def test_counted_equals_closed_form(name, grid, text, rate):
    size = MODELS[name]
    counted = count_flops(Architecture(size=size), grid=grid, text_tokens=text, rate=rate)
    assert counted == 2 * macs(size, grid[0] * grid[1], text, rate)


@pytest.mark.parametrize(
    ("merge", "extra"),
    [
        (AddConfig(), lambda t: 0),
        (LerpConfig(), lambda t: 0),
        (MpSumConfig(), lambda t: 0),
        (ConcatConfig(), lambda t: 2 * 1024 * 1024 * t),
        (MpCatConfig(), lambda t: 2 * 1024 * 1024 * t),
    ],
)
def test_other_merges(merge, extra):
    counted = count_flops(Architecture(merge=merge, adaln=SharedConfig()), grid=(16, 16), text_tokens=64)
    assert counted == 2 * macs(MODELS["base"], 256, 64, merge_extra=extra, heads=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"mlp": GeluConfig()},
        {"norm": LayerConfig()},
        {"attention": FullConfig(qk_norm=QKNorm.cosine), "merge": CrossConfig(qk_norm=QKNorm.rms)},
    ],
    ids=str,
)
def test_what_costs_as_much_as_the_default(fields):
    """A GELU of 1.5 times the width has the matrix products of a SwiGLU; norms have none."""
    size = MODELS["tiny"]
    assert count_flops(Architecture(size=size, **fields), grid=(8, 8), text_tokens=16) == 2 * macs(size, 64, 16)


def test_hyper():
    """One pass of the approximator for each of three vectors of each sublayer: 8 blocks of 2, and 2 merges."""
    size, d = MODELS["tiny"], MODELS["tiny"].dim
    each = (d + 32) * d + 5 * 2 * d * d + d * d
    counted = count_flops(Architecture(size=size, adaln=HyperConfig()), grid=(8, 8), text_tokens=16)
    assert counted == 2 * (macs(size, 64, 16, heads=0) + 3 * (2 * 8 + 2) * each)


@pytest.mark.parametrize(
    ("tokens", "text", "dense", "routed"),
    [(256, 256, 161, 126), (1024, 256, 451, 288), (2304, 256, 1063, 605), (4096, 512, 2377, 1295)],
)
def test_anchor(tokens, text, dense, routed):
    """Giga multiply-adds of base. The anchor computes text in the last block too, where only image tokens are needed."""
    for rate, giga in ((0.0, dense), (0.5, routed)):
        whole = macs(MODELS["base"], tokens, text, rate, trim=False)
        assert whole / 1e9 == pytest.approx(giga, abs=1)
        assert 0.97 * whole < macs(MODELS["base"], tokens, text, rate) < whole


def test_checkpointing_is_not_forward_work():
    size = dataclasses.replace(MODELS["nano"], gradient_checkpointing=True)
    plain, recomputing = (count_flops(Architecture(size=s), grid=(4, 4), text_tokens=4) for s in (MODELS["nano"], size))
    assert plain == recomputing


@pytest.mark.parametrize("backbone", ["xut", "uvit", "hdit", "dit", "mmdit", "sana"])
def test_every_backbone_is_counted_on_the_meta_device(backbone):
    """All of them are planned and matched before anything runs; twice the image tokens cost more, and no more than four times."""
    from nano import architecture

    small, large = (count_flops(architecture(backbone=backbone), grid=grid, text_tokens=3) for grid in ((4, 4), (4, 8)))
    assert small < large < 4 * small
