"""Linear attention against its quadratic form in float64, and against SANA in diffusers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano import SIZE, inputs, network

from hdm import torchvision_cpu
from hdm.config.axes import ATTENTION, ENCODING
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import QKNorm
from hdm.model.attention import Layout
from hdm.model.encoding import AxialRopeConfig, NopeConfig
from hdm.model.init import initialize
from hdm.model.linear_attention import LinearConfig
from hdm.train.optimizer import fan_ins

D, HEADS, C = SIZE.dim, SIZE.heads, SIZE.head_dim
DRAW = np.random.default_rng(8)
X = torch.from_numpy(DRAW.standard_normal((2, 9, D)) * 2)
PLAIN = Layout(position=torch.zeros(2, 9, 2, dtype=torch.float64))


def built(encoding=None, **fields):
    encoding = ENCODING.build(encoding or NopeConfig(), SIZE, (-0.5, 0.5))
    module = ATTENTION.build(LinearConfig(**{"head_dim": 8, **fields}), SIZE, encoding)
    initialize(module, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return module.double(), encoding


def turn(x, rotation):
    """(T, D) channels in heads of the model's width, whose first pairs turn by (H, T, P)."""
    z = x.reshape(len(x), HEADS, C).transpose(1, 0, 2).copy()
    p = rotation.shape[-1]
    pairs = (z[..., 0 : 2 * p : 2] + 1j * z[..., 1 : 2 * p : 2]) * rotation
    z[..., 0 : 2 * p : 2], z[..., 1 : 2 * p : 2] = pairs.real, pairs.imag
    return z.transpose(1, 0, 2).reshape(x.shape)


@pytest.mark.parametrize("head_dim", [4, 8, 32])
@pytest.mark.parametrize("kind", [QKNorm.none, QKNorm.rms])
def test_equals_a_matrix_of_weights(kind, head_dim):
    """(T, T) weights turn(relu q) turn(relu k) / (relu q sum relu k); padding has none, the first alone are the first."""
    module, encoding = built(AxialRopeConfig(), qk_norm=kind, head_dim=head_dim)
    position = torch.from_numpy(DRAW.uniform(-0.5, 0.5, (2, 9, 2)))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    layout = Layout(position=position, rotation=encoding.rotation(position), mask=mask)
    got = module(X, layout)
    w = {name: p.detach().numpy() for name, p in module.named_parameters()}
    for i in range(2):
        q, k, v = np.split(X[i].numpy() @ w["qkv.weight"].T, 3, axis=-1)
        if kind is QKNorm.rms:
            q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{s}_norm.weight"] for s, x in (("q", q), ("k", k)))
        q, k = np.maximum(q, 0), np.maximum(k, 0) * mask[i].numpy()[:, None]
        rotation = layout.rotation[i].numpy()
        mixed = []
        for h in range(D // head_dim):
            part = slice(h * head_dim, (h + 1) * head_dim)
            odds = turn(q, rotation)[:, part] @ turn(k, rotation)[:, part].T
            total = (q[:, part] @ k[:, part].T).sum(axis=1, keepdims=True)
            mixed.append(odds @ v[:, part] / (total + 1e-8))
        expected = np.concatenate(mixed, axis=1) @ w["out.weight"].T + w["out.bias"]
        np.testing.assert_allclose(got[i].detach(), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(module(X, layout, only=4), got[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [QKNorm.none, QKNorm.rms])
@pytest.mark.parity("`attention=linear`", "diffusers SanaLinearAttnProcessor2_0, float32")
def test_is_the_attention_of_sana_in_diffusers(kind):
    """diffusers sums in fp32, whatever it is given."""
    torchvision_cpu.declare()
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    module, _ = built(qk_norm=kind)
    theirs = Attention(
        query_dim=D,
        heads=D // 8,
        kv_heads=D // 8,
        dim_head=8,
        qk_norm=None if kind is QKNorm.none else "rms_norm_across_heads",
        eps=1e-6,
        processor=SanaLinearAttnProcessor2_0(),
    )
    q, k, v = module.qkv.weight.chunk(3)
    state = {"to_q.weight": q, "to_k.weight": k, "to_v.weight": v}
    state |= {f"to_out.0.{leaf}": p for leaf, p in module.out.named_parameters()}
    if kind is QKNorm.rms:
        state |= {"norm_q.weight": module.q_norm.weight, "norm_k.weight": module.k_norm.weight}
    theirs.load_state_dict(state)
    expected = theirs.double()(X)
    torch.testing.assert_close(module(X, PLAIN), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parity("`attention=linear`, its sums", "diffusers SanaMultiscaleLinearAttention, float32")
def test_is_the_sum_of_the_multiscale_attention_in_diffusers():
    """That of DC-AE, without its convolutions, in float64 but for its division."""
    torchvision_cpu.declare()
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    module, _ = built()
    theirs = SanaMultiscaleLinearAttention(D, D, attention_head_dim=8, kernel_sizes=(), eps=1e-8)
    q, k, v = (x.transpose(1, 2).unflatten(1, (D // 8, 8)) for x in module.qkv(X).chunk(3, dim=-1))
    read = theirs.apply_linear_attention(q.relu(), k.relu(), v).flatten(1, 2).transpose(1, 2)
    expected = module.out(read.double())
    torch.testing.assert_close(module(X, PLAIN), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@settings(max_examples=15)
@given(order=st.permutations(range(9)), turned=st.booleans())
def test_permuting_tokens_permutes_the_result(order, turned):
    module, encoding = built(AxialRopeConfig() if turned else None)
    position = torch.linspace(-0.5, 0.5, 36, dtype=torch.float64).view(2, 9, 2)

    def run(x, position):
        return module(x, Layout(position=position, rotation=encoding.rotation(position)))

    torch.testing.assert_close(run(X[:, order], position[:, order]), run(X, position)[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoding", [AxialRopeConfig(), AxialRopeConfig(learned=True), NopeConfig()], ids=str)
def test_positions_move_what_is_read_unless_nothing_turns(encoding):
    module, scheme = built(encoding)
    position = torch.linspace(-0.5, 0.5, 36, dtype=torch.float64).view(2, 9, 2)
    near, far = (module(X, Layout(position=p, rotation=scheme.rotation(p))) for p in (position / 9, position))
    assert torch.equal(near, far) == isinstance(encoding, NopeConfig)


def test_sums_are_taken_in_fp32_under_bf16():
    """Only q, k, v and the result are rounded to bf16: it is the rounded exact one, but where that lies between two numbers."""
    module, _ = built()
    module.out = torch.nn.Identity()
    x, layout = torch.randn(1, 500, D, generator=torch.Generator().manual_seed(1)), Layout(position=torch.zeros(1, 500, 2))
    with torch.autocast("cpu", torch.bfloat16):
        low, qkv = module.float()(x, layout), module.qkv(x).double()
    q, k, v = (part.view(500, D // 8, 8).transpose(0, 1) for part in qkv[0].chunk(3, dim=-1))
    odds = q.relu() @ k.relu().mT
    exact = (odds @ v / (odds.sum(dim=-1, keepdim=True) + 1e-8)).transpose(0, 1).reshape(1, 500, D)
    assert low.dtype == torch.bfloat16
    assert (low == exact.bfloat16()).double().mean() > 0.995


def test_queries_that_meet_no_key_read_nothing():
    """relu(q) may be zero in a whole head: 0 / eps and no NaN, in the gradients too."""
    module, _ = built()
    with torch.no_grad():
        module.qkv.weight[:D] = 0
    x = X.clone().requires_grad_()
    out = module(x, PLAIN)
    assert torch.equal(out, module.out.bias.expand_as(out))
    out.square().sum().backward()
    assert x.grad.isfinite().all()


def test_a_network_runs_on_a_part_of_the_tokens():
    model = network(attention=("linear", {"qk_norm": QKNorm.rms}))
    given = inputs(model)
    out = given.run(model, routed=True)
    assert out.isfinite().all()
    assert not torch.equal(out, given.run(model))


def test_parameters():
    """The names and shapes of full attention, so that arms share their start; norms are over all channels."""
    plain, linear = (dict(network(attention=name, perturbed=False).named_parameters()) for name in ("full", "linear"))
    assert plain.keys() == linear.keys()
    assert all(torch.equal(plain[name], linear[name]) for name in plain)
    model = network(attention=("linear", {"qk_norm": QKNorm.rms}))
    fans = [fan for name, fan in fan_ins(model).items() if ".attn.q_norm." in name or ".attn.k_norm." in name]
    assert fans == [D] * 2 * 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attention.head_dim=48", r"attention\.head_dim=48: does not divide model\.dim=1024"),
        ("attention.qk_norm=cosine", r"attention\.qk_norm=cosine: attention=linear takes none or rms"),
    ],
)
def test_refusals(line, message):
    with pytest.raises(ConfigError, match=message):
        compose(["attention=linear", line, "model=base"])
