"""Routing, and what must hold across axes (spec 14)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano import SIZE, architecture, inputs, network

from hdm.config.axes import discover
from hdm.model import Route, build
from hdm.model.adaln import Gate
from hdm.model.routing import Tread, TreadConfig

ZERO_GATES = {"adaln": ("shared", {"gate": Gate.zero})}
MERGES = discover()["merge"].names()


# --- routing ----------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 400), rate=st.floats(0, 0.99))
def test_kept_tokens(tokens, rate):
    """N - int(N rate) distinct tokens, in order, those with the smallest draws."""
    noise = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    kept = Tread(TreadConfig(rate=rate), SIZE).kept(Route(noise=noise), tokens)
    if int(tokens * rate) == 0:
        assert kept is None
        return
    assert kept.shape == (2, tokens - int(tokens * rate))
    assert (kept.diff(dim=1) > 0).all()
    for row, index in zip(noise, kept):
        bypassing = torch.ones(tokens, dtype=torch.bool)
        bypassing[index] = False
        assert row[index].max() <= row[bypassing].min()


def test_counts_of_kept_tokens_from_the_public_implementations():
    """24 tokens at .25, 1/3, .5, .75 keep 18, 16, 12, 6; 255 at .5 keep 128: the floor is on what bypasses (spec 1.3 h and 4)."""
    for tokens, rate, keep in ((24, 0.25, 18), (24, 1 / 3, 16), (24, 0.5, 12), (24, 0.75, 6), (255, 0.5, 128)):
        assert Tread(TreadConfig(rate=rate), SIZE).kept(Route(noise=torch.rand(1, tokens)), tokens).shape[1] == keep


def test_rate_zero_means_zero():
    """Configured or asked for, and no route at all, and no routing: one and the same pass, bit by bit (spec 14, invariant 9)."""
    model = network()
    given = inputs(model)
    dense = given.run(model)
    assert torch.equal(model(given.x, given.timestep, given.condition, route=Route(noise=given.route.noise, rate=0.0)), dense)
    assert torch.equal(given.run(network(routing=("tread", {"rate": 0.0})), routed=True), dense)
    assert torch.equal(given.run(network(routing="none"), routed=True), dense)
    assert not torch.equal(given.run(model, routed=True), dense)


def test_the_rate_of_a_route_wins():
    model = network()
    given = inputs(model)
    asked = model(given.x, given.timestep, given.condition, route=Route(noise=given.route.noise, rate=0.75))
    assert torch.equal(asked, given.run(network(routing=("tread", {"rate": 0.75})), routed=True))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_a_route_of_identity_blocks_returns_its_input(rate):
    """With zero gates every block is the identity, so the whole network is its two linear ends, bit by bit (invariant 2)."""
    model = network(perturbed=False, **ZERO_GATES)
    given = inputs(model)
    ends = model.out(model.patch(given.x), (4, 4))
    route = Route(noise=given.route.noise, rate=rate)
    assert torch.equal(model(given.x, given.timestep, given.condition, route=route), ends)
    assert torch.equal(given.run(model), ends)


def test_bypassing_tokens_are_untouched_by_the_middle():
    """With identities before and behind the route, the velocity of a bypassing token's patch is that of the two ends."""
    model = network()
    model.pre, model.post = torch.nn.ModuleList(), torch.nn.ModuleList()
    given = inputs(model)
    routed, ends = given.run(model, routed=True), model.out(model.patch(given.x), (4, 4))
    same = (routed == ends).all(dim=1).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).all(dim=3).flatten(1)
    kept = model.routing.kept(given.route, 16)
    assert torch.equal((~same).nonzero()[:, 1].view(2, -1), kept)


# --- one plain stack --------------------------------------------------------------------------------------------------


def test_without_merges_the_u_is_a_plain_stack():
    """Six blocks are six blocks, however they are dealt to pre, encoder, decoder and post (invariant 1)."""
    deals = (
        {"pre_depth": 1, "depth": 2, "dec_blocks": 1},
        {"pre_depth": 3, "depth": 1, "dec_blocks": 1},
        {"pre_depth": 0, "depth": 1, "dec_blocks": 4},
    )
    models = [build(architecture(merge="none", size=deal)) for deal in deals]
    first = models[0]
    given = inputs(first)
    expected = given.run(first)
    for model in models[1:]:
        for (_, ours), (_, theirs) in zip(blocks(model), blocks(first)):
            ours.load_state_dict(theirs.state_dict())
        assert len(blocks(model)) == 6
        assert torch.equal(given.run(model), expected)


def blocks(model):
    from hdm.model.block import Block

    return [(name, m) for name, m in model.named_modules() if isinstance(m, Block)]


@pytest.mark.parametrize("merge", MERGES)
def test_zero_gates_reduce_every_gated_sublayer_to_nothing(merge):
    """At zero gates cross is none; gated and weighted_add start as none whatever the gates (invariant 1).

    Stream and encoder state are then equal, and between equals lerp chooses nothing.
    """
    plain, model = network(perturbed=False, merge="none", **ZERO_GATES), network(perturbed=False, merge=merge, **ZERO_GATES)
    given = inputs(model)
    identical = torch.equal(given.run(model), given.run(plain))
    assert identical == (merge in {"none", "cross", "gated", "weighted_add", "lerp"})


@pytest.mark.parametrize("merge", ["gated", "weighted_add"])
def test_identity_at_the_start(merge):
    plain, model = network(perturbed=False, merge="none"), network(perturbed=False, merge=merge)
    given = inputs(model)
    assert torch.equal(given.run(model), given.run(plain))


# --- symmetry ---------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(order=st.permutations(range(16)), encoding=st.sampled_from(["axial_rope", "sincos_abs", "learned_abs", "nope"]))
def test_permuting_tokens_with_their_positions_permutes_the_velocity(order, encoding):
    """Invariant 3: nothing but the position map knows where a token is."""
    model = network(encoding=encoding)
    given = inputs(model)
    before = to_patches(given.run(model))
    given.x = from_patches(to_patches(given.x)[:, order])
    given.condition.position = given.condition.position[:, order]
    torch.testing.assert_close(to_patches(given.run(model)), before[:, order], rtol=1e-4, atol=1e-5)


def test_positions_matter_except_to_nope():
    for encoding in discover()["encoding"].names():
        model = network(encoding=encoding)
        given = inputs(model)
        before = given.run(model)
        given.condition.position = given.condition.position * 0.5
        assert torch.equal(given.run(model), before) == (encoding == "nope")


def to_patches(x):
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def from_patches(tokens):
    return tokens.view(len(tokens), 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), 4, 8, 8)


def test_pairing_decides_which_states_are_read():
    """Zeroing what a decoder reads of the first encoder state matters to mirror only."""
    from hdm.model.merge import Pairing

    mirror, deepest = (network(merge=("add", {"pairing": p})) for p in (Pairing.mirror, Pairing.deepest))
    given = inputs(mirror)
    seen = []
    for model in (mirror, deepest):
        states, merged = {}, {}
        for i in range(2):
            model.encoder[i][-1].register_forward_hook(lambda m, a, out, i=i, s=states: s.__setitem__(i, out))
            model.decoder[i][0].merge.register_forward_hook(lambda m, a, out, i=i, s=merged: s.__setitem__(i, a[1]))
        given.run(model)
        seen.append([next(j for j in states if states[j] is merged[i]) for i in range(2)])
    assert seen == [[1, 0], [1, 1]]
