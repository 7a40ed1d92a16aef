"""Parameter counts equal those of the report and of its author's code (spec 0, 1.2, 2 and 3), on the meta device."""

import dataclasses

import pytest
import torch

from hdm.config.compose import compose
from hdm.config.schema import MODELS, Final, QKNorm
from hdm.model import XUT, Architecture, build
from hdm.model.adaln import (
    Activation,
    Gate,
    HyperConfig,
    NoShiftConfig,
    PerLayerConfig,
    ScaleOnlyConfig,
    SharedMlp1Config,
    SharedOneConfig,
    SingleConfig,
    Triples,
)
from hdm.model.adaln import NoneConfig as NoAdaLNConfig
from hdm.model.attention import FullConfig
from hdm.model.embed import PatchOutput, final_modulation
from hdm.model.encoding import AxialRopeConfig, CoordChannelsConfig, FluxRopeConfig, LearnedAbsConfig, NopeConfig, SincosAbsConfig
from hdm.model.mapping import Approximator
from hdm.model.merge import (
    AddConfig,
    ConcatConfig,
    CrossConfig,
    GatedConfig,
    GateOf,
    LerpConfig,
    MpCatConfig,
    MpSumConfig,
    NoneConfig,
    Start,
    WeightedAddConfig,
)
from hdm.model.mlp import GeluConfig
from hdm.model.norm import DynamicTanhConfig, LayerConfig, RmsConfig

LEARNED = AxialRopeConfig(fraction=1.0, learned=True)
D = 1024


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def built(**fields):
    return build(Architecture(**fields), seed=None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 343_163_920),
        ({"encoding": LEARNED}, 343_176_208),
        ({"encoding": LEARNED, "size": dataclasses.replace(MODELS["base"], heads=16, head_dim=64)}, 343_176_208),
        ({"size": MODELS["large"], "context_dim": 1152}, 555_613_456),
        ({"size": MODELS["large"], "context_dim": 1152, "encoding": LEARNED}, 555_628_816),
        ({"size": MODELS["small"], "context_dim": 640, "encoding": LEARNED}, 237_290_128),
        ({"encoding": LEARNED, "adaln": PerLayerConfig()}, 431_364_112),
        ({"encoding": LEARNED, "adaln": SharedMlp1Config()}, 309_603_344),
        ({"encoding": LEARNED, "adaln": SharedMlp1Config(triples=Triples.kind)}, 334_775_312),
    ],
)
def test_whole_network(fields, expected):
    model = built(**fields)
    assert count(model) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_parts_of_base():
    model = built(encoding=LEARNED)
    parts = {
        "pre": 13_642_240, "post": 40_926_720, "adaln": 3 * 16_786_432, "text": 1_049_600, "aspect": 1_051_648, "time": 1_049_600,
        "patch": 17_408, "out": 16_400,
    }  # fmt: skip
    assert {name: count(getattr(model, name)) for name in parts} == parts
    assert count(model.encoder) + count(model.decoder) == 235_063_296
    assert count(model.decoder[0][0]) - count(model.decoder[0][1]) == 4_196_864


@pytest.mark.parametrize(
    ("merge", "each"),
    [
        (AddConfig(), 0),
        (NoneConfig(), 0),
        (WeightedAddConfig(), 1),
        (WeightedAddConfig(both=True), 2),
        (LerpConfig(), 1),
        (MpSumConfig(), 0),
        (MpCatConfig(), 2 * D * D),
        (ConcatConfig(), 2_098_176),
        (ConcatConfig(start=Start.normal), 2_098_176),
        (GatedConfig(), 3 * D * D + D),
        (GatedConfig(gate=GateOf.channel), D),
        (GatedConfig(gate=GateOf.time), D * D + D),
    ],
)
def test_merges(merge, each):
    """Against cross, its four merges, their norms and the modulation MLP that no other merge needs are gone."""
    cross = 4_196_864 - 512  # without the learned frequencies
    assert count(built(merge=merge)) == 343_163_920 - 4 * cross - 16_786_432 + 4 * each


@pytest.mark.parametrize(
    ("adaln", "expected"),
    [
        (NoAdaLNConfig(), 0),
        (SharedMlp1Config(), 16_786_432),
        (SharedMlp1Config(triples=Triples.family), 29_372_416),
        (SharedMlp1Config(triples=Triples.kind), 41_958_400),
        (PerLayerConfig(), 138_547_200),
        (SingleConfig(), 3 * (3 * D * D + 3 * D) + 44 * 3 * D),
        (SharedOneConfig(), 9 * (D * D + D)),
        (PerLayerConfig(activation=Activation.silu), 138_547_200),
        (PerLayerConfig(gate=Gate.none), 44 * 2 * (D * D + D)),
        (NoShiftConfig(), 44 * 2 * (D * D + D)),
        (ScaleOnlyConfig(), 44 * D * D),
        (ScaleOnlyConfig(gate=Gate.zero), 44 * 2 * D * D),
        (ScaleOnlyConfig(mapping=2), 44 * D * D + 2 * (9 * D * D + D) + 2 * D),
        (HyperConfig(), (D + 32 + 1) * D + 5 * (2 * (D * D + D) + D) + D * D + D),
        (HyperConfig(width=5.0), 267_797_504 + (D - 32) * 5 * D),  # Chroma's has 64 inputs, ours D + 32
    ],
)
def test_adaln_of_base(adaln, expected):
    assert count(built(adaln=adaln).adaln) == expected


@pytest.mark.parametrize(
    ("adaln", "expected"),
    [
        (PerLayerConfig(), 151_142_400),
        (PerLayerConfig(gate=Gate.zero, activation=Activation.silu), 151_142_400),
        (SharedOneConfig(), 6_297_600),
        (SharedMlp1Config(), 16_786_432),
        (SharedMlp1Config(triples=Triples.family), 29_372_416),
        (SingleConfig(), 6_447_104 - 2 * D),
        (PerLayerConfig(gate=Gate.none), 100_761_600),
        (NoShiftConfig(), 100_761_600),
        (ScaleOnlyConfig(), 50_331_648),
    ],
)
def test_adaln_of_24_plain_blocks(adaln, expected):
    """Spec 3 counts 24 blocks of two sublayers; its single has a final norm of 2D besides, which XUT has not."""
    size = dataclasses.replace(MODELS["base"], depth=5)
    assert count(built(adaln=adaln, size=size, merge=NoneConfig()).adaln) == expected


def test_final_modulations():
    """DiT's last layer has 2,099,200 parameters of its own; PixArt's table makes adaLN-single of 24 blocks 6,447,104."""
    with torch.device("meta"):
        assert count(final_modulation(Final.adaln, D)) == 2_099_200
        size = dataclasses.replace(MODELS["base"], depth=5)
        single = built(adaln=SingleConfig(gate=Gate.zero), size=size, merge=NoneConfig()).adaln
        assert count(single) + count(final_modulation(Final.table, D)) == 6_447_104
        assert count(PatchOutput(4, D, 2, final=final_modulation(Final.adaln, D))) == 16_400 + 2_099_200


@pytest.mark.parametrize(("dim", "expected"), [(1024, 267_797_504), (3072, 278_285_312)])
def test_chromas_approximator(dim, expected):
    """64 inputs, 5 layers of 5120 channels; Flux's modulations, which it replaces, have 3,247,448,064 parameters."""
    with torch.device("meta"):
        assert count(Approximator(64, 5120, dim, layers=5)) == expected
    double, single = 19 * 2 * (6 * 3072 * 3073), 38 * 3 * 3072 * 3073
    assert double + single + 2 * 3072 * 3073 == 3_247_448_064
    assert 19 * 2 * 6 + 38 * 3 + 2 == 344


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (AxialRopeConfig(), 0),
        (AxialRopeConfig(sincos=True), 0),
        (FluxRopeConfig(), 0),
        (SincosAbsConfig(), 0),
        (NopeConfig(), 0),
        (LearnedAbsConfig(extent=1.0, text=77), (256 + 77) * D),  # U-ViT's table has one entry more, for time
        (CoordChannelsConfig(), 2 * 2 * 2 * D),
    ],
    ids=str,
)
def test_encodings_of_base(encoding, expected):
    model = built(encoding=encoding)
    assert count(model.encoding) == expected
    assert count(model) == 343_163_920 + expected


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"norm": LayerConfig()}, 44 * D),
        ({"norm": DynamicTanhConfig()}, 44 * (D + 1)),
        ({"norm": RmsConfig(affine=False)}, -44 * D),
        ({"norm": LayerConfig(affine=False)}, -44 * D),
        ({"mlp": GeluConfig()}, -20 * 3072 // 2),
        ({"mlp": GeluConfig(width=1.0)}, -20 * (D * 3072 + 3072)),
        ({"attention": FullConfig(qk_norm=QKNorm.rms)}, 20 * 2 * 128),
        ({"attention": FullConfig(qk_norm=QKNorm.layer)}, 20 * 4 * 128),
        ({"attention": FullConfig(qk_norm=QKNorm.cosine)}, 20 * 8),
        ({"merge": CrossConfig(qk_norm=QKNorm.cosine)}, 4 * 8),
    ],
)
def test_norms_mlps_and_attention_of_base(fields, more):
    """20 blocks, 24 attentions, 44 sublayers."""
    assert count(built(**fields)) == 343_163_920 + more


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the author's published base weights, under our names."""
    block = {
        "attn.qkv.weight": (3 * D, D), "attn.out.weight": (D, D), "attn.out.bias": (D,), "attn.rope.freqs": (16, 16, 2),
        "mlp.w12.weight": (6 * D, D), "mlp.w12.bias": (6 * D,), "mlp.w3.weight": (D, 3 * D), "mlp.w3.bias": (D,),
        "attn_norm.weight": (D,), "mlp_norm.weight": (D,),
    }  # fmt: skip
    merge = {
        "merge.attn.q.weight": (D, D), "merge.attn.kv.weight": (2 * D, D), "merge.attn.out.weight": (D, D),
        "merge.attn.out.bias": (D,), "merge.attn.rope.freqs": (16, 16, 2), "merge_norm.weight": (D,),
    }  # fmt: skip
    head = {
        "0.weight": (D,),
        "0.bias": (D,),
        "1.weight": (4 * D, D),
        "1.bias": (4 * D,),
        "3.weight": (3 * D, 4 * D),
        "3.bias": (3 * D,),
    }
    blocks = {f"encoder.{i}.0": block for i in range(4)} | {f"post.{i}": block for i in range(3)} | {"pre.0": block}
    blocks |= {f"decoder.{i}.{j}": block | (merge if j == 0 else {}) for i in range(4) for j in range(3)}
    names = {f"{path}.{name}": shape for path, inner in blocks.items() for name, shape in inner.items()}
    names |= {f"adaln.heads.{kind}.{name}": shape for kind in ("attn", "merge", "mlp") for name, shape in head.items()}
    return names | {
        "patch.proj.weight": (D, 4, 2, 2), "patch.proj.bias": (D,), "out.proj.weight": (16, D), "out.proj.bias": (16,),
        "time.proj.weight": (D, D), "time.proj.bias": (D,), "text.proj.weight": (D, D), "text.proj.bias": (D,),
        "aspect.up.weight": (D, 1), "aspect.up.bias": (D,), "aspect.out.weight": (D, D), "aspect.out.bias": (D,),
    }  # fmt: skip


def test_every_tensor_of_the_published_weights_has_its_place():
    """255 tensors are published, one of which, the frequencies of the time embedding, is no parameter here."""
    model = build(Architecture.of(compose(["preset=xut_upstream"])), seed=None)
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert ours == published()
    assert len(ours) == 254


def test_constructor_works_under_the_meta_device_and_as_a_plain_library():
    with torch.device("meta"):
        assert count(XUT(Architecture())) == 343_163_920
    from nano import architecture

    direct, by_build = XUT(architecture()), build(architecture())
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), by_build.parameters()))
