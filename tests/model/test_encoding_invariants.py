"""Invariants 3, 4 and 5 of spec 14, for every encoding under every position map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano import SIZE, inputs, network

from hdm.config.axes import ENCODING, POSITION, discover
from hdm.model.encoding import Order, Spacing, TextPosition
from hdm.model.init import initialize
from hdm.model.position import Interpolation, Origin

discover()
LEARNED = {"learned": True, "fraction": 1.0, "spacing": Spacing.constant}
HDIT = {"spacing": Spacing.log_open, "high": 10.0, "order": Order.blocks}
EVA = {"spacing": Spacing.lang, "fraction": 1.0, "order": Order.blocks, "sincos": True}
ENCODINGS = [*((name, {}) for name in ENCODING.names()), *(("axial_rope", fields) for fields in (LEARNED, HDIT, EVA))]
ENCODINGS += [("flux_rope", {"text": TextPosition.index})]
MAPS = [*((name, {}) for name in POSITION.names()), ("rect1", {"origin": Origin.corner})]
MAPS += [("integer", {"interpolation": Interpolation.base, "scale": 2.0})]

encodings, maps, grids = st.sampled_from(ENCODINGS), st.sampled_from(MAPS), st.tuples(st.integers(1, 9), st.integers(1, 9))


def made(axis, choice, *args):
    name, fields = choice
    return axis.build(axis.get(name).config(**fields), *args)


def entered(encoding, map_, views, grids, text=0):
    """What an encoding makes of the tokens of each view, besides `text` tokens at (0, 0): embedding and rotation."""
    map_ = made(POSITION, map_)
    scheme = made(ENCODING, encoding, SIZE, map_.square)
    initialize(scheme, 0)
    layer = scheme.per_layer()
    if layer is not None:
        initialize(layer, 0)
    for view, grid in zip(views, grids):
        position = map_(torch.tensor([view], dtype=torch.float64), grid)
        whole = torch.nn.functional.pad(position, (0, 0, 0, text))
        n = position.shape[1]
        yield scheme.double().embed(position), layer.double()(whole) if layer is not None else scheme.rotation(whole, n)


@settings(max_examples=60)
@given(encoding=encodings, map_=maps, data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_a_crop_is_encoded_as_in_the_whole(encoding, map_, data, rows, columns):
    """Invariant 5: what tokens get is what they have in the whole image, added or turned."""
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    h, w = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    side = data.draw(st.sampled_from([8, 16, 32]))
    image = [side * rows, side * columns]
    views = ([*image, 0, 0, *image], [*image, side * top, side * left, side * h, side * w])
    (added, turned), (added_crop, turned_crop) = entered(encoding, map_, views, ((rows, columns), (h, w)))
    index = (torch.arange(rows * columns).view(rows, columns)[top : top + h, left : left + w]).flatten()
    if added is not None:
        torch.testing.assert_close(added_crop, added[:, index], rtol=0, atol=1e-9)
    if turned is not None:
        torch.testing.assert_close(turned_crop, turned[:, :, index], rtol=0, atol=1e-9)
    assert encoding[0] == "nope" or added is not None or turned is not None


@settings(max_examples=40)
@given(encoding=encodings, map_=maps, grids=st.tuples(grids, grids), text=st.integers(1, 5))
def test_text_does_not_turn_with_the_size_of_the_image(encoding, map_, grids, text):
    """Invariant 4: the rotation of text tokens is the same beside every image, and none at all but where text has numbers."""
    views = [[16 * r, 16 * c, 0, 0, 16 * r, 16 * c] for r, c in grids]
    turned = [rotation for _, rotation in entered(encoding, map_, views, grids, text)]
    if turned[0] is None:
        return
    first, second = (rotation[:, :, -text:] for rotation in turned)
    assert torch.equal(first, second)
    assert bool((first == 1).all()) == (encoding[1].get("text") is not TextPosition.index)


@pytest.mark.parametrize("choice", ENCODINGS, ids=str)
def test_text_enters_the_same_beside_images_of_any_size(choice):
    """Invariant 4, in the network: what the first block is given of text tokens."""
    model = network(encoding=choice)
    seen = []
    model.pre[0].register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    states = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))
    for grid in ((4, 4), (2, 6), (3, 3)):
        given = inputs(model, grid=grid)
        given.condition.text = states
        given.run(model)
    for tokens, layout in seen:
        assert torch.equal(tokens[:, -3:], seen[0][0][:, -3:])
        assert not layout.position[:, -3:].any()


@settings(max_examples=25)
@given(order=st.permutations(range(12)), encoding=encodings, map_=maps)
def test_permuting_tokens_with_their_positions_permutes_the_velocity(order, encoding, map_):
    """Invariant 3: nothing but the position map knows where a token is, whatever encodes it."""
    model = network(encoding=encoding, position=map_)
    given = inputs(model, grid=(2, 6), dtype=torch.float64)
    model.double()
    before = to_patches(given.run(model))
    given.x = from_patches(to_patches(given.x)[:, order])
    given.condition.position = given.condition.position[:, order]
    torch.testing.assert_close(to_patches(given.run(model)), before[:, order], rtol=0, atol=1e-9)


def to_patches(x):
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def from_patches(tokens):
    return tokens.view(len(tokens), 2, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), 4, 4, 12)
