"""Routings: who is where, by hooks on the blocks; and what is found in the place of tokens that were away (spec 4)."""

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from nano import inputs, network

from hdm.model import Route
from hdm.model.block import Block
from hdm.model.routing import _redrawn

PLAIN = {"backbone": ("dit", {"blocks": 6}), "merge": "none", "text_fusion": "cross_attn"}


def lengths(model, given, route=None):
    seen = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda _m, i, _o, name=name: seen.update({name: i[0].shape[1]}))
    model(given.x, given.timestep, given.condition, route=route or given.route)
    return seen


def test_lengths_of_tread():
    """Six blocks, the route around blocks 1 to 3, half of 16 tokens (spec 4)."""
    model = network(**PLAIN, routing=("tread", {"rate": 0.5}), size={"pre_depth": 1, "post_depth": 2})
    assert list(lengths(model, inputs(model)).values()) == [16, 8, 8, 8, 16, 16]


@pytest.mark.parametrize(("routing", "kept"), [("tread", 128), ("deferred_mask", 127), ("mask_mae", 127)])
def test_odd_numbers_of_tokens_round_as_published(routing, kept):
    """Of 255 at a half TREAD rounds those that leave, the masks those that stay (spec 4)."""
    route = Route(noise=torch.rand(2, 255))
    assert network(**PLAIN, routing=(routing, {"rate": 0.5})).routing.kept(route, 255).shape == (2, kept)


@pytest.mark.parametrize("axes", [{}, PLAIN, {"backbone": "uvit", "merge": "concat"}, PLAIN | {"text_fusion": "mmdit"}])
def test_order_of_the_kept_tokens_is_of_no_consequence(axes):
    """Attention with rotary positions does not see it."""
    models = [network(**axes, routing=("tread", {"ordered": ordered})).double() for ordered in (True, False)]
    given = inputs(models[0], dtype=torch.float64)
    torch.testing.assert_close(*(given.run(m, routed=True) for m in models), rtol=0, atol=1e-10)


@drawn(st.lists(st.integers(0, 2**24 - 1), min_size=2, max_size=50, unique=True), st.integers(1, 4))
def test_redrawn_is_one_to_one_on_the_lattice(integers, number):
    """Exactly k a^n mod 2^24 with an odd, in Python's integers, of which k comes back by the inverse of a^n."""
    got = (_redrawn(torch.tensor([integers]).float() / 2**24, number)[0] * 2**24).long().tolist()
    factor = pow(10368889, number, 2**24)
    assert got == [k * factor % 2**24 for k in integers]
    assert [k * pow(factor, -1, 2**24) % 2**24 for k in got] == integers


def test_second_route_is_uniform_and_independent():
    """Each token is kept by half of all draws, and by half of those where the first route keeps it, within 5 sigma."""
    noise = torch.rand(20000, 16, generator=torch.Generator().manual_seed(0))
    first, second = (_redrawn(noise, i).argsort(dim=1).argsort(dim=1) < 8 for i in (0, 1))
    sigma = (0.25 / 20000) ** 0.5
    assert ((second.double().mean(dim=0) - 0.5).abs() < 5 * sigma).all()
    assert (((first & second).double().mean(dim=0) - 0.25).abs() < 5 * sigma).all()


def test_removed_patches_are_zero_and_unlearned():
    model = network(**PLAIN, routing=("deferred_mask", {"rate": 0.75}))
    given = inputs(model)
    out, mask = given.run(model, routed=True), model.unlearned(given.route, (8, 8)).mask
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, given.route.noise.argsort(dim=1)[:, :4], True)
    assert torch.equal(mask[:, 0, ::2, ::2].flatten(1), ~kept)
    assert (out[mask.expand_as(out)] == 0).all() and (out[~mask.expand_as(out)] != 0).all()
    assert [n for name, n in lengths(model, given).items()] == [16, 16, 4, 4, 4, 4, 4, 4]


def test_mask_tokens_come_before_the_decoder():
    model = network(**PLAIN, routing=("mask_mae", {"rate": 0.75}))
    given, seen = inputs(model), []
    model.stack[5].register_forward_hook(lambda _m, i, _o: seen.append(i[0]))
    assert list(lengths(model, given).values()) == [4] * 5 + [16]
    removed = torch.ones(2, 16, dtype=torch.bool).scatter(1, given.route.noise.argsort(dim=1)[:, :4], False)
    assert (seen[0][removed] == model.routing.mask_token).all()


def test_sprint_skips_its_middle():
    model = network(**PLAIN, routing="sprint", size={"pre_depth": 1, "post_depth": 1})
    given = inputs(model)
    assert list(lengths(model, given, Route(noise=given.route.noise, rate=1.0))) == ["stack.0", "stack.5"]
    assert list(lengths(model, given).values()) == [16, 4, 4, 4, 4, 16]


def test_gradients_take_both_ways():
    model = network(**PLAIN, routing=("tread", {"rate": 0.5}), size={"pre_depth": 1})
    given, seen = inputs(model), []
    model.stack[0].register_forward_hook(lambda _m, _i, out: (out.retain_grad(), seen.append(out))[0])
    given.run(model, routed=True).square().sum().backward()
    assert (seen[0].grad.abs().sum(dim=2) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in model.stack[2].mlp.parameters())
