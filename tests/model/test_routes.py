"""Routes through a whole network against gather and scatter written out in float64, image by image (spec 4)."""

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from nano import inputs, network, shapes_unchecked

from hdm.model import Route
from hdm.model.adaln import Gate
from hdm.model.attention import Layout

FACTOR = 10368889  # see hdm.model.routing: the draws of route r are k FACTOR^r mod 2^24 of k / 2^24
BLOCKS, PRE, POST = 7, 1, 2
DIT = {"backbone": ("dit", {"blocks": BLOCKS}), "text_fusion": "concat", "encoding": "axial_rope", "adaln": "shared"}
SIZES = {"pre_depth": PRE, "post_depth": POST}


class Walk:
    """One image's tokens through the blocks of a plain stack, of which a list says who takes each; text always does."""

    def __init__(self, model, given, image):
        self.model, rows = model, slice(image, image + 1)
        c = given.condition[rows]
        self.time = model.time(given.timestep[rows]) + model.aspect(c.aspect)
        text, _ = model.text(c)
        self.tokens = torch.cat([model.patch(given.x[rows]), text], dim=1)
        self.n = self.tokens.shape[1] - text.shape[1]
        self.position = torch.cat([c.position, torch.zeros(1, text.shape[1], 2, dtype=torch.float64)], dim=1)
        self.real = torch.cat([torch.ones(1, self.n, dtype=torch.bool), c.text_mask], dim=1)
        self.numbers = [int(k) for k in (given.route.noise[image] * 2**24).tolist()]
        self.all = list(range(self.tokens.shape[1]))

    def kept(self, keep, route=0):
        """The `keep` image tokens of the smallest draws, and all text."""
        drawn = [k * FACTOR**route % 2**24 for k in self.numbers]
        return sorted(range(self.n), key=drawn.__getitem__)[:keep] + self.all[self.n :]

    def blocks(self, first, last, tokens, index):
        """Blocks first … last - 1 on tokens that stand at the places `index`."""
        images = sum(i < self.n for i in index)
        position = self.position[:, index]
        rotation = self.model.encoding.rotation(position)
        layout = Layout(position=position, rotation=rotation, mask=self.real[:, index], images=images)
        for i in range(first, last):
            block = self.model.stack[i]
            tokens = block(tokens, layout, block.own(self.model.adaln(self.time)))
        return tokens

    def velocity(self, tokens):
        return self.model.out(tokens[:, : self.n], (4, 4), self.time)


def tread(walk, keep, routes):
    x = walk.blocks(0, PRE, walk.tokens, walk.all)
    inside = BLOCKS - PRE - POST
    for route in range(routes):
        first, last = (PRE + inside * r // routes for r in (route, route + 1))
        index = walk.kept(keep, route)
        part = walk.blocks(first, last, x[:, index], index)
        x = x.clone()
        for place, token in zip(index, part[0]):
            x[0, place] = token
    return walk.velocity(walk.blocks(BLOCKS - POST, BLOCKS, x, walk.all))


def sprint(walk, keep):
    x = walk.blocks(0, PRE, walk.tokens, walk.all)
    index = walk.kept(keep)
    part = walk.blocks(PRE, BLOCKS - POST, x[:, index], index)[0]
    routing = walk.model.routing
    fused = []
    for place in walk.all:
        middle = part[index.index(place)] if place in index else routing.mask_token
        fused.append(routing.fuse.weight[:, :32] @ x[0, place] + routing.fuse.weight[:, 32:] @ middle + routing.fuse.bias)
    return walk.velocity(walk.blocks(BLOCKS - POST, BLOCKS, torch.stack(fused)[None], walk.all))


def mask_mae(walk, keep):
    index = walk.kept(keep)
    part = walk.blocks(0, BLOCKS - POST, walk.tokens[:, index], index)[0]
    x = torch.stack([part[index.index(place)] if place in index else walk.model.routing.mask_token for place in walk.all])
    return walk.velocity(walk.blocks(BLOCKS - POST, BLOCKS, x[None], walk.all))


def deferred_mask(walk, keep):
    layout = Layout(
        position=walk.position, rotation=walk.model.encoding.rotation(walk.position), mask=walk.real, images=walk.n, grid=(4, 4)
    )
    x = walk.tokens
    for block in walk.model.mixer:
        x = block(x, layout, block.own(walk.model.adaln(walk.time)))
    index = walk.kept(keep)
    part = walk.blocks(0, BLOCKS, x[:, index], index)
    out = torch.zeros(1, walk.n, 16, dtype=torch.float64)
    for place, token in zip(index, walk.model.out.project(part[:, :keep], walk.time)[0]):
        out[0, place] = token
    return walk.model.out.lay(out, (4, 4))


def expected(kind, walk, keep):
    name, fields = kind
    written = {"tread": tread, "sprint": sprint, "mask_mae": mask_mae, "deferred_mask": deferred_mask}[name]
    return written(walk, keep, fields["routes"]) if "routes" in fields else written(walk, keep)


KINDS = [("tread", {"routes": r, "ordered": o}) for r in (1, 2, 3, 4) for o in (True, False)]
KINDS += [("sprint", {}), ("mask_mae", {}), ("deferred_mask", {})]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, (kind[0], *kind[1].values()))))
@shapes_unchecked()
@pytest.mark.parity("routings `tread`, `sprint`, `mask_mae`, `deferred_mask`", "gather and scatter image by image, float64")
def test_a_routed_network_is_gather_and_scatter(kind):
    """Also with a rate of the route's own; the last has no prediction of removed patches."""
    model = network(**DIT, routing=kind, size=SIZES).double()
    given = inputs(model, dtype=torch.float64)
    given.route.noise = torch.tensor(
        [[(7919 * i + 104729 * b) % 2**24 / 2**24 for i in range(1, 17)] for b in range(2)], dtype=torch.float64
    )
    for rate in (None, 0.3):
        share = model.routing.rate if rate is None else rate
        keep = int(16 * (1 - share)) if kind[0].endswith(("mask", "mae")) else 16 - int(16 * share)
        route = Route(noise=given.route.noise, rate=rate)
        got = model(given.x, given.timestep, given.condition, route=route)
        for image in range(2):
            want = expected(kind, Walk(model, given, image), keep)[0]
            torch.testing.assert_close(got[image], want, rtol=0, atol=1e-12 * want.abs().max().item())


# --- invariants 2 and 9 of spec 14, for every routing -----------------------------------------------------------------

BACKBONES = ("xut", "uvit", "dit", "mmdit")
ROUTINGS = [("tread", {"routes": r, "ordered": o}) for r in (1, 2) for o in (True, False)]
ROUTINGS += [("sprint", {}), ("mask_mae", {}), ("deferred_mask", {})]


def goes(backbone, routing):
    """A U has one route, and U-ViT's skips need the same tokens at both of their ends."""
    return not (routing[1].get("routes", 1) > 1 and backbone in ("xut", "uvit")) and not (
        backbone == "uvit" and routing[0] in ("sprint", "mask_mae")
    )


PAIRS = [(backbone, routing) for backbone in BACKBONES for routing in ROUTINGS if goes(backbone, routing)]
GRIDS = st.sampled_from([(4, 4), (2, 6), (3, 5)])


def scrambled(seed, *, but=(), **axes):
    """A network of random weights, apart from the modules named in `but`."""
    model, draw = network(perturbed=False, **axes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(tuple(but)):
                p += 0.2 * torch.randn(p.shape, generator=draw)
    return model


@settings(max_examples=25)
@drawn(pair=st.sampled_from(PAIRS), rate=st.floats(0, 0.99), grid=GRIDS, seed=st.integers(0, 2**20))
@shapes_unchecked()
def test_invariant_2_a_route_of_identity_blocks_returns_its_input(pair, rate, grid, seed):
    """At zero gates every block is the identity, whatever its weights: to the bit, the network is what stands around them.

    That is its two ends; with sprint the fusion of a stream with itself, or with the mask token, in between; and a removed patch
    is the mask token's, or 0.
    """
    backbone, routing = pair
    axes = {
        "backbone": backbone,
        "text_fusion": "mmdit" if backbone == "mmdit" else "concat",
        "routing": routing,
        "encoding": "nope",
    }
    model = scrambled(seed, but=["adaln."], adaln=("shared", {"gate": Gate.zero}), merge="none", **axes)
    given = inputs(model, grid=grid)
    route = Route(noise=given.route.noise, rate=rate)
    got = model(given.x, given.timestep, given.condition, route=route)
    tokens, kept = model.patch(given.x), model.routing.kept(route, grid[0] * grid[1])
    stays = torch.ones(2, tokens.shape[1], dtype=torch.bool)
    if kept is not None:
        stays = torch.zeros_like(stays).scatter(1, kept, True)
    time = model.time(given.timestep) + model.aspect(given.condition.aspect)
    name = routing[0]
    if name in ("sprint", "mask_mae") and kept is not None:
        middle = torch.where(stays[..., None], tokens, model.routing.mask_token)
    else:
        middle = tokens
    if name == "sprint":
        with_text = inputs(model, grid=grid).condition.text.shape[1]  # the layer sees text too: as many rows as in the network
        whole = [torch.cat([x, x.new_zeros(2, with_text, 32)], dim=1) for x in (tokens, middle)]
        middle = model.routing.fuse(torch.cat(whole, dim=-1))[:, : tokens.shape[1]]
    expected = model.out(middle, grid, time)
    if name == "deferred_mask" and kept is not None:
        gone = ~stays.view(2, 1, *grid).repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = expected.masked_fill(gone, 0.0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # its output layer sees another number of rows
    else:
        assert torch.equal(got, expected)


@settings(max_examples=20)
@drawn(pair=st.sampled_from(PAIRS), grid=GRIDS, seed=st.integers(0, 2**20))
@shapes_unchecked()
def test_invariant_9_rate_zero_means_zero(pair, grid, seed):
    """Configured or asked for, it is the unrouted pass, bit by bit."""
    backbone, (name, fields) = pair
    asked = scrambled(seed, backbone=backbone, routing=(name, fields))
    configured = scrambled(seed, backbone=backbone, routing=(name, fields | {"rate": 0.0}))
    given = inputs(asked, grid=grid)
    dense = given.run(asked)
    zero = asked(given.x, given.timestep, given.condition, route=Route(noise=given.route.noise, rate=0.0))
    assert torch.equal(zero, dense)
    assert torch.equal(given.run(configured, routed=True), dense)
    assert asked.unlearned(Route(noise=given.route.noise, rate=0.0), given.x.shape[2:]) is None
