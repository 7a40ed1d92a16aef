"""Merges against their equations in float64 numpy (spec 2)."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from nano import SIZE, inputs, network

from hdm.config.axes import ENCODING, MERGE, discover
from hdm.model.adaln import Gate
from hdm.model.attention import Layout
from hdm.model.encoding import NopeConfig
from hdm.model.init import initialize
from hdm.model.merge import GateOf, Start
from hdm.train.optimizer import fan_ins

discover()
DRAW = np.random.default_rng(3)
X, S = DRAW.standard_normal((2, 2, 5, SIZE.dim))


def built(name, **fields):
    merge = MERGE.build(MERGE.get(name).config(**fields), SIZE, ENCODING.build(NopeConfig(), SIZE, (-0.5, 0.5)))
    initialize(merge, 0)
    return merge.double()


def merged(merge, x=X, s=S):
    return merge(torch.from_numpy(x), torch.from_numpy(s), Layout(position=torch.zeros(len(x), x.shape[1], 2))).detach().numpy()


@pytest.mark.parametrize(
    ("name", "fields", "of_x", "of_s"),
    [
        ("lerp", {}, 0.5, 0.5),
        ("lerp", {"init": 0.25}, 0.25, 0.75),
        ("lerp", {"init": 1.0}, 1, 0),
        ("weighted_add", {"init": 0.5}, 1, 0.5),
        ("weighted_add", {"init": 0.5, "both": True}, 1, 0.5),
        ("mp_sum", {}, 0.5**0.5, 0.5**0.5),
        ("mp_sum", {"t": 0.3}, 0.7 / 0.58**0.5, 0.3 / 0.58**0.5),
        ("mp_sum", {"t": 0.0}, 1, 0),
        ("mp_sum", {"t": 1.0}, 0, 1),
    ],
    ids=str,
)
def test_sums(name, fields, of_x, of_s):
    np.testing.assert_allclose(merged(built(name, **fields)), of_x * X + of_s * S, rtol=0, atol=1e-12)


def test_learned_scalars_are_what_they_multiply():
    lerp, add = built("lerp"), built("weighted_add", both=True)
    with torch.no_grad():
        lerp.factor.fill_(0.125), add.stream.fill_(-0.5), add.scale.fill_(2.0)
    np.testing.assert_allclose(merged(lerp), S + 0.125 * (X - S), rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged(add), -0.5 * X + 2 * S, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.8])
def test_mp_cat(t):
    """C / sqrt(Na) (1 - t) and C / sqrt(Nb) t with C = sqrt((Na + Nb) / ((1 - t)^2 + t^2)), then rows of unit length."""
    merge, d = built("mp_cat", t=t), SIZE.dim
    c = np.sqrt((d + d) / ((1 - t) ** 2 + t**2))
    both = np.concatenate([c / np.sqrt(d) * (1 - t) * X, c / np.sqrt(d) * t * S], axis=-1)
    weight = merge.proj.weight.detach().numpy()
    weight = weight / np.sqrt((weight**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(merged(merge), both @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mp_sum", "mp_cat"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.7])
def test_magnitudes_are_preserved(name, t):
    """Independent streams of magnitude 1 become one of magnitude 1, which concat's initial weights shrink to sqrt(1 / 3)."""
    x, s = DRAW.standard_normal((2, 1, 20_000, SIZE.dim))
    assert np.sqrt((merged(built(name, t=t), x, s) ** 2).mean()) == pytest.approx(1, abs=0.01)
    assert np.sqrt((merged(built("concat"), x, s) ** 2).mean()) == pytest.approx(3**-0.5, abs=0.05)


def test_the_balanced_half_is_concat_with_normed_rows():
    mp, concat = built("mp_cat"), built("concat")
    with torch.no_grad():
        concat.proj.weight.copy_(mp.proj.weight / mp.proj.weight.norm(dim=1, keepdim=True))
        concat.proj.bias.zero_()
    np.testing.assert_allclose(merged(mp), merged(concat), rtol=0, atol=1e-12)


def test_scalars_have_the_rate_of_a_gain():
    """fan-in D, not 1: by their shape they would move by the base rate a step."""
    for merge, names in (("lerp", ["factor"]), (("weighted_add", {"both": True}), ["scale", "stream"])):
        fans = fan_ins(network(merge=merge))
        assert {fans[f"decoder.{i}.0.merge.{name}"] for i in range(2) for name in names} == {SIZE.dim}


def test_lerp_is_torchs():
    merge = built("lerp", init=0.3)
    expected = torch.lerp(torch.from_numpy(S), torch.from_numpy(X), merge.factor.double().item())
    np.testing.assert_allclose(merged(merge), expected, rtol=0, atol=1e-12)


@dataclass(kw_only=True, slots=True)
class Timed(Layout):
    """A layout that carries the time embedding."""

    time: torch.Tensor


def test_gated_by_its_tokens_by_a_channel_and_by_the_time():
    tokens, channel, time = (built("gated", gate=gate) for gate in GateOf)
    for merge in (tokens, channel):
        np.testing.assert_array_equal(merged(merge), X)  # the identity at the start
    draw = np.random.default_rng(4)
    w, g, h, b = (draw.standard_normal(shape) for shape in ((SIZE.dim, SIZE.dim), SIZE.dim, (SIZE.dim, SIZE.dim), SIZE.dim))
    with torch.no_grad():
        tokens.proj.weight.copy_(torch.from_numpy(w)), channel.scale.copy_(torch.from_numpy(g))
    odds = np.concatenate([X, S], axis=-1) @ tokens.gate.weight.detach().numpy().T + tokens.gate.bias.detach().numpy()
    np.testing.assert_allclose(merged(tokens), X + 1 / (1 + np.exp(-odds)) * (S @ w.T), rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged(channel), X + g * S, rtol=0, atol=1e-12)

    t = draw.standard_normal((len(X), 1, SIZE.dim))
    given = torch.from_numpy(X), torch.from_numpy(S), Timed(position=torch.zeros(2, 5, 2), time=torch.from_numpy(t))
    assert torch.equal(time(*given), given[0])
    with torch.no_grad():
        time.timed.weight.copy_(torch.from_numpy(h)), time.timed.bias.copy_(torch.from_numpy(b))
    expected = X + ((t / (1 + np.exp(-t))) @ h.T + b) * S
    np.testing.assert_allclose(time(*given).detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("adaln", ["shared", "none"])
def test_gated_by_the_time_in_the_network(adaln):
    """The identity at the start; later the gate moves with the timestep, though nothing else reads it where gates are zero."""
    fields = {"gate": Gate.zero} if adaln == "shared" else {}
    plain, model = (network(perturbed=False, merge=m, adaln=(adaln, fields)) for m in ("none", ("gated", {"gate": GateOf.time})))
    given = inputs(model)
    assert torch.equal(given.run(model), given.run(plain))
    model.train()
    given.run(model, routed=True).square().sum().backward()
    assert all(model.decoder[i][0].merge.timed.weight.grad.any() for i in range(2))


def test_the_start_of_concat():
    """U-ViT's law is a normal one of std 0.02; its cut at +-2 lies a hundred standard deviations away."""
    wide = {"size": {"dim": 256, "heads": 4, "head_dim": 64, "mlp_dim": 384}}
    uniform, normal = (
        network(perturbed=False, merge=("concat", {"start": start}), **wide).decoder[0][0].merge.proj for start in Start
    )
    assert not normal.bias.any() and uniform.bias.any()
    assert uniform.weight.abs().max() <= 512**-0.5
    assert uniform.weight.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.01)
    assert normal.weight.std().item() == pytest.approx(0.02, rel=0.01)
    standard = normal.weight.flatten() / 0.02
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # the kurtosis of a normal law
    theirs = torch.nn.init.trunc_normal_(torch.empty(512, 256), std=0.02)
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    torch.testing.assert_close(normal.weight.flatten().quantile(quantiles), theirs.flatten().quantile(quantiles), rtol=0, atol=1e-3)


def test_every_merge_but_none_needs_skips():
    for name in MERGE.names():
        assert list(MERGE.get(name).config.needs) == ([] if name == "none" else ["skips"])
