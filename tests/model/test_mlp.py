"""GEGLU and Mix-FFN against their equations and diffusers (spec 7); SwiGLU and GELU are in test_sublayers."""

import pytest
import torch
from nano import SIZE, network
from torch.nn import functional as F

from hdm import torchvision_cpu
from hdm.config.axes import MLP
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import MODELS
from hdm.model.attention import Layout
from hdm.model.init import initialize
from hdm.model.mlp import GegluConfig, MixFfnConfig
from hdm.train.optimizer import fan_ins

D = SIZE.dim
GRID, N, TEXT = (4, 6), 24, 3
LAYOUT = Layout(position=torch.zeros(2, N + TEXT, 2), grid=GRID)
X = torch.randn(2, N + TEXT, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def built(config):
    module = MLP.build(config, SIZE)
    initialize(module, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return module.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parity("`mlp=geglu`", "diffusers FeedForward, geglu")
def test_geglu_is_that_of_diffusers(bias):
    torchvision_cpu.declare()
    from diffusers.models.attention import FeedForward

    ours = built(GegluConfig(bias=bias))
    theirs = FeedForward(D, inner_dim=SIZE.mlp_dim, activation_fn="geglu", bias=bias).double()
    theirs.net[0].proj.load_state_dict(ours.w12.state_dict())
    theirs.net[2].load_state_dict(ours.w3.state_dict())
    torch.testing.assert_close(ours(X, LAYOUT), theirs(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [2.5, 1.0, None])
@pytest.mark.parity("`mlp=mix_ffn`", "diffusers GLUMBConv")
def test_mix_ffn_is_that_of_sana_in_diffusers(ratio):
    torchvision_cpu.declare()
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    ours = built(MixFfnConfig(ratio=ratio))
    theirs = GLUMBConv(D, D, expand_ratio=SIZE.mlp_dim / D if ratio is None else ratio, residual_connection=False).double()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    theirs.conv_inverted.weight.data = ours.w12.weight[..., None, None].detach()
    theirs.conv_inverted.bias.data = ours.w12.bias.detach()
    theirs.conv_depth.load_state_dict(ours.conv.state_dict())
    theirs.conv_point.weight.data = ours.w3.weight[..., None, None].detach()
    image = X[:, :N]
    expected = theirs(image.transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(image, LAYOUT), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(X, LAYOUT)[:, :N], expected, rtol=0, atol=1e-12)


def test_text_takes_the_linear_layers_of_mix_ffn_only():
    ours = built(MixFfnConfig())
    a, b = F.silu(F.linear(X[:, N:], ours.w12.weight, ours.w12.bias)).chunk(2, dim=-1)
    expected = F.linear(a * F.silu(b), ours.w3.weight)
    torch.testing.assert_close(ours(X, LAYOUT)[:, N:], expected, rtol=0, atol=1e-12)


def test_a_token_of_mix_ffn_reaches_its_eight_neighbours():
    ours, moved = built(MixFfnConfig()), X.clone()
    moved[:, 2 * GRID[1] + 3] += 1
    reach = (ours(moved, LAYOUT) - ours(X, LAYOUT)).abs().amax(dim=(0, 2)) > 0
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(reach[:N].view(GRID), expected)
    assert not reach[N:].any()


def test_mix_ffn_refuses_a_subset_of_the_tokens():
    ours = built(MixFfnConfig())
    part = LAYOUT.take(torch.arange(8).expand(2, -1))
    with pytest.raises(ValueError, match=r"mlp=mix_ffn: .*complete grid.*use routing=none"):
        ours(X[:, :8], part)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GegluConfig(), 3 * 1024 * 3072),
        (GegluConfig(bias=True), 3 * 1024 * 3072 + 2 * 3072 + 1024),
        (MixFfnConfig(), 3 * 1024 * 2560 + 5120 + 10 * 5120),
        (MixFfnConfig(ratio=None), 3 * 1024 * 3072 + 11 * 6144),
    ],
    ids=str,
)
def test_parameters_of_base(config, expected):
    with torch.device("meta"):
        module = MLP.build(config, MODELS["base"])
    assert sum(p.numel() for p in module.parameters()) == expected


@pytest.mark.parametrize("mlp", [("geglu", {"bias": True}), ("mix_ffn", {"ratio": None})], ids=str)
def test_gated_networks_share_their_start(mlp):
    """What has the same name and shape begins at the same values, so that arms are paired."""
    swiglu, other = (dict(network(mlp=m, perturbed=False).named_parameters()) for m in ("swiglu", mlp))
    for leaf in ("w12.weight", "w12.bias", "w3.weight"):
        assert torch.equal(swiglu[f"pre.0.mlp.{leaf}"], other[f"pre.0.mlp.{leaf}"])


def test_filters_start_as_torch_starts_them_and_learn_as_gains():
    model = network(mlp="mix_ffn", perturbed=False)
    parameters, fans = dict(model.named_parameters()), fan_ins(model)
    hidden = 2 * int(2.5 * D)
    for leaf, fan in (("weight", 9 * hidden), ("bias", hidden)):
        conv = parameters[f"pre.0.mlp.conv.{leaf}"]
        assert conv.abs().max() <= 1 / 3
        assert conv.std().item() == pytest.approx(1 / 27**0.5, rel=0.15)
        assert fans[f"pre.0.mlp.conv.{leaf}"] == fan


def test_rows_are_no_columns():
    """A transposed image gives the transposed result when the filters are transposed too, and only then."""
    ours, image = built(MixFfnConfig()), X[:, :N]

    def flip(x, rows, columns):
        return x.view(2, rows, columns, -1).transpose(1, 2).flatten(1, 2)

    layout = Layout(position=torch.zeros(2, N, 2), grid=GRID[::-1])
    expected, transposed = ours(image, LAYOUT), flip(image, *GRID)
    assert not torch.allclose(flip(ours(transposed, layout), *GRID[::-1]), expected)
    ours.conv.weight.data = ours.conv.weight.data.transpose(2, 3).contiguous()
    torch.testing.assert_close(flip(ours(transposed, layout), *GRID[::-1]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("line", "message"),
    [("mlp.ratio=0.3", r"mlp\.ratio=0\.3: makes 307\.2 channels of model\.dim=1024"), ("mlp.ratio=0", r"mlp\.ratio=0\.0: makes 0")],
)
def test_refusals(line, message):
    with pytest.raises(ConfigError, match=message):
        compose(["mlp=mix_ffn", line, "routing=none", "model=base"])
