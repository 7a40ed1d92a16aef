"""Norms, MLPs and attention against float64 equations, and against diffusers where it has the same layer (spec 7)."""

import numpy as np
import pytest
import torch
from nano import SIZE, network

from hdm import torchvision_cpu
from hdm.config.axes import ATTENTION, ENCODING, MLP, NORM
from hdm.config.schema import QKNorm
from hdm.model.attention import CrossAttention, FullConfig, Layout
from hdm.model.encoding import AxialRopeConfig, NopeConfig
from hdm.model.init import initialize
from hdm.model.mlp import GeluConfig, SwigluConfig
from hdm.model.norm import DynamicTanhConfig, LayerConfig, RmsConfig
from hdm.train.optimizer import fan_ins

D, HEADS, C = SIZE.dim, SIZE.heads, SIZE.head_dim
DRAW = np.random.default_rng(5)
X = DRAW.standard_normal((2, 6, D)) * 3 + 0.5
LAYOUT = Layout(position=torch.zeros(2, 6, 2))


def ready(module, std=0.2):
    """Initial values moved away from zeros and ones, in float64."""
    initialize(module, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p += std * torch.randn(p.shape, generator=draw)
    return module.double()


def weights(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


# --- norm and mlp -----------------------------------------------------------------------------------------------------


def rms(x, eps=1e-6):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def standard(x, eps=1e-6):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize(
    ("config", "equation"),
    [
        (RmsConfig(), lambda w: rms(X) * w["weight"]),
        (LayerConfig(), lambda w: standard(X) * w["weight"] + w["bias"]),
        (DynamicTanhConfig(), lambda w: np.tanh(w["alpha"] * X) * w["weight"] + w["bias"]),
    ],
)
@pytest.mark.parity("`norm=rms`, `layer`, `dynamic_tanh`", "their equations in numpy, float64")
def test_norms(config, equation):
    norm = ready(NORM.build(config, D))
    np.testing.assert_allclose(norm(torch.from_numpy(X)).detach(), equation(weights(norm)), rtol=0, atol=1e-12)


def test_initial_values_of_norms():
    """Gain 1, bias 0, a = init; a scalar that stands for D channels has their learning rate."""
    norm = NORM.build(DynamicTanhConfig(init=0.8), D)
    initialize(norm, 0)
    np.testing.assert_allclose(norm(torch.from_numpy(X).float()).detach(), np.tanh(0.8 * X), rtol=0, atol=1e-6)
    model = network(norm="dynamic_tanh")
    assert fan_ins(model)["decoder.0.0.merge_norm.alpha"] == D


@pytest.mark.parametrize("config", [RmsConfig(), LayerConfig(), DynamicTanhConfig()], ids=str)
def test_norms_return_the_dtype_that_they_are_given(config):
    norm = NORM.build(config, D)
    initialize(norm, 0)
    x = torch.from_numpy(X).bfloat16()
    exact = norm.double()(x.double())
    norm.float()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=0.02, atol=0.02)


def test_swiglu_and_gelu():
    x = torch.from_numpy(X)
    mlp = ready(MLP.build(SwigluConfig(), SIZE))
    w = weights(mlp)
    a, b = np.split(X @ w["w12.weight"].T + w["w12.bias"], 2, axis=-1)
    np.testing.assert_allclose(
        mlp(x, LAYOUT).detach(), (a / (1 + np.exp(-a)) * b) @ w["w3.weight"].T + w["w3.bias"], rtol=0, atol=1e-11
    )
    mlp = ready(MLP.build(GeluConfig(), SIZE))
    w = weights(mlp)
    assert w["up.weight"].shape == (1.5 * SIZE.mlp_dim, D)
    h = X @ w["up.weight"].T + w["up.bias"]
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(mlp(x, LAYOUT).detach(), h @ w["down.weight"].T + w["down.bias"], rtol=0, atol=1e-11)


@pytest.mark.parity("`mlp=gelu`", "diffusers FeedForward, gelu-approximate")
def test_gelu_is_the_feed_forward_of_dit_in_diffusers():
    torchvision_cpu.declare()
    from diffusers.models.attention import FeedForward

    mlp = ready(MLP.build(GeluConfig(), SIZE))
    theirs = FeedForward(D, inner_dim=72, activation_fn="gelu-approximate").double()
    theirs.net[0].proj.load_state_dict(mlp.up.state_dict())
    theirs.net[2].load_state_dict(mlp.down.state_dict())
    x = torch.from_numpy(X)
    torch.testing.assert_close(mlp(x, LAYOUT), theirs(x), rtol=0, atol=1e-12)


# --- attention --------------------------------------------------------------------------------------------------------

KINDS = list(QKNorm)


def full(kind, encoding=None):
    encoding = ENCODING.build(encoding or NopeConfig(), SIZE, (-0.5, 0.5))
    return ready(ATTENTION.build(FullConfig(qk_norm=kind), SIZE, encoding)), encoding


def normed(kind, side, x, w):
    """Queries or keys of all heads (H, T, C), before they are turned, by the equations of spec 7; logits are their products."""
    match kind:
        case QKNorm.none:
            return x / C**0.25
        case QKNorm.rms:
            return rms(x) * w[f"qk_norm.{side}.weight"] / C**0.25
        case QKNorm.layer:
            return (standard(x) * w[f"qk_norm.{side}.weight"] + w[f"qk_norm.{side}.bias"]) / C**0.25
        case QKNorm.cosine:
            scale = w["qk_norm.logit_scale"][:, None, None]
            return x * np.sqrt(scale) / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


def split(x):
    return x.reshape(len(x), HEADS, C).transpose(1, 0, 2)


def turned(x, rotation):
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.pad(rotation, ((0, 0), (0, 0), (0, C // 2 - rotation.shape[-1])), constant_values=1)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_full_attention_equals_its_equations(kind):
    """Norm, turn, softmax, on each head; padding is not attended to, and the first tokens alone are the first of all."""
    attention, encoding = full(kind, AxialRopeConfig())
    position = torch.from_numpy(DRAW.uniform(-0.5, 0.5, (2, 6, 2)))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    layout = Layout(position=position, rotation=encoding.rotation(position), mask=mask)
    got = attention(torch.from_numpy(X), layout)
    w = weights(attention)
    for i in range(2):
        q, k, v = (split(part) for part in np.split(X[i] @ w["qkv.weight"].T, 3, axis=-1))
        rotation = layout.rotation[i].numpy()
        logits = turned(normed(kind, "q", q, w), rotation) @ turned(normed(kind, "k", k, w), rotation).transpose(0, 2, 1)
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True)) * mask[i].numpy()
        mixed = (odds / odds.sum(axis=-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(6, D)
        np.testing.assert_allclose(got[i].detach(), mixed @ w["out.weight"].T + w["out.bias"], rtol=0, atol=1e-11)
    torch.testing.assert_close(attention(torch.from_numpy(X), layout, only=4), got[:, :4], rtol=0, atol=1e-12)


THEIRS = {QKNorm.none: None, QKNorm.rms: "rms_norm", QKNorm.layer: "layer_norm", QKNorm.cosine: "l2"}


def diffusers_attention(kind, ours, q, k, v):
    """The attention of diffusers with our weights. Its l2 norm has no scale: logits are cos(q, k) / sqrt(C)."""
    torchvision_cpu.declare()
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    theirs = Attention(
        query_dim=D, cross_attention_dim=D, heads=HEADS, dim_head=C, qk_norm=THEIRS[kind], eps=1e-6, processor=AttnProcessor2_0()
    )
    state = {
        "to_q.weight": q,
        "to_k.weight": k,
        "to_v.weight": v,
        "to_out.0.weight": ours.out.weight,
        "to_out.0.bias": ours.out.bias,
    }
    for side in "qk" if kind in (QKNorm.rms, QKNorm.layer) else "":
        state |= {f"norm_{side}.{leaf}": p for leaf, p in getattr(ours.qk_norm, side).named_parameters()}
    theirs.load_state_dict(state)
    if kind is QKNorm.cosine:
        with torch.no_grad():
            ours.qk_norm.logit_scale.fill_(C**-0.5)
    return theirs.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parity("`attention=full`, QK-norm {kind.name}", "diffusers Attention, squares in float32")
def test_full_attention_is_that_of_diffusers(kind):
    attention, _ = full(kind)
    theirs = diffusers_attention(kind, attention, *attention.qkv.weight.chunk(3))
    x = torch.from_numpy(X)
    expected = theirs(x)
    got = attention(x, Layout(position=torch.zeros(2, 6, 2)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # diffusers takes squares in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parity("`merge=cross`, QK-norm {kind.name}", "diffusers Attention, squares in float32")
def test_cross_attention_is_that_of_diffusers(kind):
    attention = ready(CrossAttention(SIZE, qk_norm=kind))
    theirs = diffusers_attention(kind, attention, attention.q.weight, *attention.kv.weight.chunk(2))
    x, state = torch.from_numpy(X), torch.from_numpy(DRAW.standard_normal((2, 6, D)))
    expected = theirs(x, encoder_hidden_states=state)
    got = attention(x, state, Layout(position=torch.zeros(2, 6, 2)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_cosine_starts_at_ten_and_learns_as_a_gain():
    model = network(attention=("full", {"qk_norm": QKNorm.cosine}), merge=("cross", {"qk_norm": QKNorm.cosine}), perturbed=False)
    scales = {name: p for name, p in model.named_parameters() if name.endswith("logit_scale")}
    assert len(scales) == 8 + 2
    assert all((p == 10).all() and p.shape == (HEADS,) for p in scales.values())
    assert {fan_ins(model)[name] for name in scales} == {D}


@pytest.mark.parametrize(("kind", "each"), [(QKNorm.rms, 2), (QKNorm.layer, 4)])
def test_gains_that_heads_share_learn_as_gains(kind, each):
    model = network(attention=("full", {"qk_norm": kind}), perturbed=False)
    fans = [fan for name, fan in fan_ins(model).items() if ".qk_norm." in name]
    assert fans == [D] * each * 8


@pytest.mark.parametrize("kind", KINDS[1:])
def test_normed_logits_do_not_grow_with_the_stream(kind):
    """What QK-norm is for: sharper attention must be learned, it does not come with larger activations."""
    attention, _ = full(kind)
    layout = Layout(position=torch.zeros(2, 6, 2))
    x, bias = torch.from_numpy(X), attention.out.bias
    torch.testing.assert_close(attention(100 * x, layout) - bias, 100 * (attention(x, layout) - bias), rtol=1e-4, atol=1e-4)
    plain, _ = full(QKNorm.none)
    assert not torch.allclose(plain(100 * x, layout) - bias, 100 * (plain(x, layout) - bias), rtol=0.1)
