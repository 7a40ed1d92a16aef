"""adaLN against the layers of diffusers, in float64, and the parts of it that only some variants have (spec 3)."""

import numpy as np
import pytest
import torch
from nano import SIZE, inputs, network, perturb
from torch import nn

from hdm import torchvision_cpu
from hdm.config.axes import ADALN, NORM
from hdm.config.schema import Final
from hdm.model.adaln import (
    Activation,
    Gate,
    NoShiftConfig,
    PerLayerConfig,
    ScaleOnlyConfig,
    SharedOneConfig,
    SingleConfig,
)
from hdm.model.embed import PatchOutput, final_modulation
from hdm.model.init import initialize
from hdm.model.mapping import Approximator, MappingNetwork
from hdm.model.norm import LayerConfig, RmsConfig

torchvision_cpu.declare()
from diffusers.models import normalization as theirs_norm  # noqa: E402 (after the declaration)
from diffusers.models.attention import FeedForward  # noqa: E402
from diffusers.models.transformers.transformer_chroma import ChromaApproximator  # noqa: E402

D, B, T = SIZE.dim, 2, 5
ATTN, MLP = "pre.0.attn", "pre.0.mlp"
DRAW = torch.Generator().manual_seed(4)
X, TIME = (torch.randn(B, n, D, generator=DRAW, dtype=torch.float64) for n in (T, 1))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def adaln(config, sublayers=(ATTN, MLP)):
    return ready(ADALN.build(config, D, list(sublayers)))


def ready(module):
    initialize(module, 0)
    return perturb(module, 0.3).double()


def norm(config):
    return ready(NORM.build(config, D))


def reordered(weight, order, parts):
    """The rows of `weight`, in `parts` blocks of D, in another order of blocks."""
    return torch.cat([weight.detach().chunk(parts)[i] for i in order])


def modulated(x, m, norm):
    h = norm(x) * (1 + m.scale)
    return h if m.shift is None else h + m.shift


@pytest.mark.parity("`adaln=per_layer`", "diffusers AdaLayerNormZero")
def test_per_layer_is_adaln_zero_of_diffusers():
    """DiT: shift, scale, gate of attention, then of the MLP, out of one layer behind a SiLU; its norm has no gain."""
    ours = adaln(PerLayerConfig(gate=Gate.zero, activation=Activation.silu))
    theirs = theirs_norm.AdaLayerNormZero(D).double()
    with torch.no_grad():
        layers = ours.layer["pre_0_attn"], ours.layer["pre_0_mlp"]
        for leaf in ("weight", "bias"):  # ours: scale, shift, gate; theirs: shift, scale, gate
            rows = [reordered(getattr(layer, leaf), (1, 0, 2), 3) for layer in layers]
            getattr(theirs.linear, leaf).copy_(torch.cat(rows))
    h, gate_msa, shift_mlp, scale_mlp, gate_mlp = theirs(X, emb=TIME[:, 0])
    got = ours(TIME)
    layer_norm = norm(LayerConfig(affine=False))
    torch.testing.assert_close(modulated(X, got[ATTN], layer_norm), h, **EXACT)
    for vector, expected in zip(
        (got[ATTN].gate, got[MLP].shift, got[MLP].scale, got[MLP].gate), (gate_msa, shift_mlp, scale_mlp, gate_mlp)
    ):
        torch.testing.assert_close(vector[:, 0], expected, **EXACT)


@pytest.mark.parity("`adaln=no_shift`", "diffusers LuminaRMSNormZero, squares in float32")
def test_no_shift_is_luminas_modulation_in_diffusers():
    """scale and gate of attention, then of the MLP, behind a SiLU, under a zero gate: the same form as LightningDiT's wo_shift."""
    ours = adaln(NoShiftConfig(gate=Gate.zero, activation=Activation.silu))
    theirs = theirs_norm.LuminaRMSNormZero(D, norm_eps=1e-6, norm_elementwise_affine=True).double()
    rms = norm(RmsConfig())
    with torch.no_grad():
        theirs.norm.weight.copy_(rms.weight)
        for leaf in ("weight", "bias"):
            rows = [getattr(ours.layer[key], leaf) for key in ("pre_0_attn", "pre_0_mlp")]
            getattr(theirs.linear, leaf).copy_(torch.cat(rows))
    h, gate_msa, scale_mlp, gate_mlp = theirs(X, emb=TIME[:, 0])
    got = ours(TIME)
    torch.testing.assert_close(modulated(X, got[ATTN], rms), h, rtol=0, atol=1e-6)  # diffusers takes squares in fp32
    for vector, expected in zip((got[ATTN].gate, got[MLP].scale, got[MLP].gate), (gate_msa, scale_mlp, gate_mlp)):
        torch.testing.assert_close(vector[:, 0], expected, **EXACT)


@pytest.mark.parity("`adaln=single`", "diffusers AdaLayerNormSingle")
def test_single_is_adaln_single_of_diffusers():
    """PixArt: one layer behind a SiLU for all blocks, and a table per block; the last table is added to the embedding itself."""
    ours, final = adaln(SingleConfig(gate=Gate.zero)), ready(final_modulation(Final.table, D))
    theirs = theirs_norm.AdaLayerNormSingle(D).double()
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            rows = [reordered(getattr(ours.proj[kind], leaf), (1, 0, 2), 3) for kind in ("attn", "mlp")]
            getattr(theirs.linear, leaf).copy_(torch.cat(rows))
    vectors, embedded = theirs(t, hidden_dtype=torch.float64)
    tables = [reordered(ours.offset[key], (1, 0, 2), 3) for key in ("pre_0_attn", "pre_0_mlp")]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (vectors + torch.cat(tables)).chunk(6, dim=1)
    got = ours(embedded[:, None])
    for name, expected in ((ATTN, (scale_msa, shift_msa, gate_msa)), (MLP, (scale_mlp, shift_mlp, gate_mlp))):
        for vector, of_theirs in zip(got[name], expected):
            torch.testing.assert_close(vector[:, 0], of_theirs, **EXACT)
    scale, shift = final.table.chunk(2)
    expected = X * (1 + embedded[:, None] + scale) + embedded[:, None] + shift
    torch.testing.assert_close(final(X, embedded[:, None]), expected, **EXACT)


@pytest.mark.parity("`backbone.final=adaln`", "diffusers AdaLayerNormContinuous")
def test_final_adaln_is_the_continuous_one_of_diffusers():
    """DiT's last layer: a norm without gain, then scale and shift out of a layer behind a SiLU, from zero."""
    layer_norm = NORM.build(LayerConfig(affine=False), D)
    out = ready(PatchOutput(4, D, 1, norm=layer_norm, final=final_modulation(Final.adaln, D)))
    theirs = theirs_norm.AdaLayerNormContinuous(D, D, elementwise_affine=False, eps=1e-6).double()
    theirs.linear.load_state_dict(out.final.layer.state_dict())
    expected = theirs(X, TIME[:, 0])
    torch.testing.assert_close(out.final(out.norm(X), TIME), expected, **EXACT)
    velocity = (expected @ out.proj.weight.T + out.proj.bias).transpose(1, 2)[:, :, None]
    torch.testing.assert_close(out(X, (1, T), TIME), velocity, **EXACT)


def test_what_stands_in_front_of_the_output_layer():
    """Nothing by default; with `zero` the first velocity is 0, and the final modulation changes nothing before it has learned."""
    plain = PatchOutput(4, D, 2)
    assert [name for name, _ in plain.named_parameters()] == ["proj.weight", "proj.bias"]
    assert final_modulation(Final.none, D) is None
    dit = PatchOutput(4, D, 2, norm=NORM.build(LayerConfig(affine=False), D), final=final_modulation(Final.adaln, D), zero=True)
    initialize(dit, 0)
    x, time = X[:, :4].float(), TIME.float()
    assert not dit(x, (2, 2), time).any()
    assert torch.equal(dit.final(x, time), x)


@pytest.mark.parity("`adaln=hyper`", "diffusers ChromaApproximator")
def test_the_approximator_is_chromas_in_diffusers():
    ours = ready(Approximator(64, 48, D, layers=5))
    theirs = ChromaApproximator(64, D, 48, n_layers=5).double()
    for norms in theirs.norms:
        norms.eps = 1e-6  # torch's default is that of the dtype
    state = {}
    for place, name in (("in_proj", "enter"), ("out_proj", "leave")):
        state |= {f"{place}.{leaf}": p for leaf, p in getattr(ours, name).named_parameters()}
    for i, (gain, up, _, down) in enumerate(ours.layers):
        state |= {f"norms.{i}.weight": gain.weight}
        state |= {f"layers.{i}.linear_{n}.{leaf}": p for n, part in ((1, up), (2, down)) for leaf, p in part.named_parameters()}
    theirs.load_state_dict(state)
    x = torch.randn(3, 7, 64, generator=DRAW, dtype=torch.float64)
    torch.testing.assert_close(ours.vectors(x), theirs(x), **EXACT)


@pytest.mark.parity("`adaln.mapping` of `scale_only`", "diffusers FeedForward, geglu, float32 and 64")
def test_the_mapping_network_is_made_of_geglu_layers():
    """Each layer is the feed-forward network of diffusers, with GEGLU and without biases, inside RMSNorm and residual."""
    ours = ready(MappingNetwork(D, 3 * D, layers=2))

    def rms(x, gain):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain

    y = rms(TIME, ours.enter.weight)
    for gain, up, down in zip(ours.norm, ours.up, ours.down):
        theirs = FeedForward(D, inner_dim=3 * D, activation_fn="geglu", bias=False).double()
        theirs.net[0].proj.load_state_dict(up.state_dict())
        theirs.net[2].load_state_dict(down.state_dict())
        y = y + theirs(rms(y, gain.weight))
    torch.testing.assert_close(ours(TIME), rms(y, ours.leave.weight), **EXACT)
    fresh = MappingNetwork(D, 3 * D, layers=2)
    initialize(fresh, 0)
    torch.testing.assert_close(fresh(TIME.float()), rms(TIME, 1).float())  # layers start as nothing, and a norm of a norm is itself


def test_scale_only_reads_the_mapped_embedding():
    ours = adaln(ScaleOnlyConfig(mapping=2))
    got = ours(TIME)[MLP]
    torch.testing.assert_close(got.scale, ours.mapping(TIME) @ ours.layer["pre_0_mlp"].weight.T, **EXACT)
    assert got.shift is None and got.gate is None


@pytest.mark.parametrize("gate", [Gate.one_plus, Gate.zero])
def test_scale_only_may_have_a_gate(gate):
    """1 + g beside sublayers that start at zero, or g, which starts there itself: never both zero, or nothing would learn."""
    ours = adaln(ScaleOnlyConfig(gate=gate))
    scale, g = (TIME @ ours.layer["pre_0_attn"].weight.T).chunk(2, dim=-1)
    got = ours(TIME)[ATTN]
    torch.testing.assert_close(got.scale, scale, **EXACT)
    torch.testing.assert_close(got.gate, g + (gate is Gate.one_plus), **EXACT)
    model = network(perturbed=False, adaln=("scale_only", {"gate": gate}))
    assert bool(model.initial()) == (gate is Gate.one_plus)
    given = inputs(model)
    assert torch.equal(given.run(model), model.out(model.patch(given.x), (4, 4)))
    given.run(model).square().sum().backward()
    parts = [p.grad for name, p in model.named_parameters() if name.endswith(("mlp.w3.weight", "_mlp.weight"))]
    assert any(grad.any() for grad in parts)


@pytest.mark.parametrize("activation", list(Activation))
def test_shared_one_is_per_layer_with_equal_layers(activation):
    names = [ATTN, "decoder.0.0.merge", MLP, "post.0.attn", "post.0.mlp"]
    one = adaln(SharedOneConfig(activation=activation), names)
    each = adaln(PerLayerConfig(activation=activation), names)
    with torch.no_grad():
        for key, layer in each.layer.items():
            kind = ["attn", "merge", "mlp"].index(key.rpartition("_")[2])
            for leaf in ("weight", "bias"):
                getattr(layer, leaf).copy_(getattr(one.proj, leaf).chunk(3)[kind])
    for name, expected in each(TIME).items():
        for vector, of_each in zip(one(TIME)[name], expected):
            torch.testing.assert_close(vector, of_each, **EXACT)


@pytest.mark.parametrize("name", ["per_layer", "no_shift", "shared_one"])
@pytest.mark.parametrize("activation", list(Activation))
def test_the_activation_stands_in_front_of_the_layer(name, activation):
    """With the identity as its layer, a scale is the embedding itself, or x sigmoid(x) of it."""
    config = ADALN.get(name).config(activation=activation, gate=Gate.none)
    ours = adaln(config, [ATTN])
    layer = ours.proj if name == "shared_one" else ours.layer["pre_0_attn"]
    with torch.no_grad():
        layer.bias.zero_(), layer.weight[:D].copy_(torch.eye(D))
    t = TIME.numpy()
    expected = t if activation is Activation.none else t / (1 + np.exp(-t))
    np.testing.assert_allclose(ours(TIME)[ATTN].scale.detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("adaln", ["shared", "shared_mlp1", "shared_one", "per_layer", "no_shift", "hyper"])
def test_at_a_zero_gate_blocks_start_as_the_identity(adaln):
    model = network(perturbed=False, adaln=(adaln, {"gate": Gate.zero}))
    given = inputs(model)
    assert torch.equal(given.run(model), model.out(model.patch(given.x), (4, 4)))


@pytest.mark.parametrize("config", [RmsConfig(affine=False), LayerConfig(affine=False)], ids=str)
def test_norms_without_gain(config):
    ours = norm(config)
    assert not list(ours.parameters())
    of_torch = (nn.RMSNorm if isinstance(config, RmsConfig) else nn.LayerNorm)(D, eps=1e-6, elementwise_affine=False).double()
    torch.testing.assert_close(ours(X), of_torch(X), **EXACT)
    x = X.numpy() - (0 if isinstance(config, RmsConfig) else X.numpy().mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(ours(X), x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6), rtol=1e-12)
