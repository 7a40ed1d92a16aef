"""Invariants 1 and 3 of spec 14: one plain stack behind all backbones, and tokens that only their positions tell apart."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nano import MODEL_AXES, architecture, inputs, network, shapes_unchecked

from hdm.config import compat
from hdm.config.axes import discover
from hdm.config.schema import Final
from hdm.model.adaln import Gate
from hdm.model.block import Block

ENDS = {"final_norm": False, "zero_output": False}
SAME = {"merge": "none", "routing": ("tread", {"rate": 0.0}), "norm": "rms", "attention": "full", "mlp": "swiglu"}
SAME |= {"encoding": "axial_rope", "size": {"post_depth": 2}}
BACKBONES = ["xut", "uvit", "mmdit", "sana", "hdit"]
ADALNS = [(name, {"gate": gate}) for name in ("shared", "per_layer", "no_shift", "single", "scale_only") for gate in Gate]
ADALNS += [("shared_mlp1", {}), ("shared_one", {}), ("hyper", {}), ("none", {})]


def scrambled(seed, **axes):
    """A network in float64 whose every weight is random."""
    model, draw = network(perturbed=False, **axes).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return model


def blocks_of(model):
    return sorted((m for m in model.modules() if isinstance(m, Block)), key=lambda block: block.index)


def transplant(plain, other):
    """Give `other` the weights of `plain`, block by block in the order of the pass; text of its own has those of the image."""
    for part in ("patch", "time", "aspect", "text", "out"):
        getattr(other, part).load_state_dict(getattr(plain, part).state_dict())
    names = {}
    for ours, theirs in zip(blocks_of(other), blocks_of(plain), strict=True):
        weights, wanted = theirs.state_dict(), ours.state_dict()
        same = ((key, key.removeprefix("text_")) for key in wanted)
        twins = {key: weights[source] for key, source in same if key not in weights and source in weights}
        if ours.ends_text:
            twins["text_attn.kv.weight"] = weights["attn.qkv.weight"][32:]
        ours.load_state_dict(weights | twins)
        names[ours.name.replace(".", "_")] = theirs.name.replace(".", "_")
    adaln = other.levels[0].adaln if hasattr(other, "levels") else other.adaln
    source = plain.adaln.state_dict()
    adaln.load_state_dict({key: source[renamed(key, names)] for key in adaln.state_dict()})


def renamed(key, names):
    """The name in the plain stack of a parameter of adaLN: that of its block, or of its kind, text being as the image."""
    for ours, theirs in names.items():
        key = key.replace(f".{ours}_", f".{theirs}_") if f".{ours}_" in key else key
    return key.replace("text_", "")


@settings(max_examples=25)
@given(name=st.sampled_from(BACKBONES), adaln=st.sampled_from(ADALNS), seed=st.integers(0, 2**20), routed=st.booleans())
@shapes_unchecked()
def test_invariant_1_every_backbone_is_the_plain_stack(name, adaln, seed, routed):
    """At rate 0 and without merges, whatever the modulation and the weights; hdit at one level, without its 2 x 2 merges."""
    assume(not (name == "mmdit" and adaln[0] in ("hyper", "shared_one")))  # one matrix for all kinds, of which it has more
    assume(not (name == "hdit" and adaln[0] == "none"))  # refused: it has no place for a token of time
    fusion = {"mmdit": "mmdit", "hdit": "cross_attn"}.get(name, "concat")
    fields = ENDS | ({"levels": 1, "inner": 9} if name == "hdit" else {"final": Final.none})
    same = SAME | {"adaln": adaln} | ({"routing": "none"} if name == "hdit" else {})
    stacked = fields | {"blocks": 9} if name == "sana" else fields
    other = scrambled(seed + 1, backbone=(name, stacked), text_fusion=fusion, **same)
    plain_fusion = "cross_attn" if name == "hdit" else "concat"
    plain = scrambled(seed, backbone=("dit", ENDS | {"final": Final.none, "blocks": 9}), text_fusion=plain_fusion, **same)
    transplant(plain, other)
    given = inputs(plain, dtype=torch.float64)
    expected = given.run(plain)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(given.run(other, routed=routed), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@settings(max_examples=20)
@given(
    adaln=st.sampled_from([each for each in ADALNS if each[1].get("gate") is not Gate.none and each[0] != "none"]),
    seed=st.integers(0, 2**20),
    routed=st.booleans(),
)
@shapes_unchecked()
def test_invariant_1_a_merge_of_zero_gate_is_no_merge(adaln, seed, routed):
    """Whatever the weights of the merge and of all else."""
    model = scrambled(seed, adaln=adaln)
    given = inputs(model, dtype=torch.float64)
    model.adaln.register_forward_hook(
        lambda _m, _i, out: {k: m._replace(gate=0 * m.scale) if k.endswith(".merge") else m for k, m in out.items()}
    )
    got = given.run(model, routed=routed)
    for block in blocks_of(model):
        block.merge = block.merge_norm = None
    assert torch.equal(got, given.run(model, routed=routed))


FREE = {"backbone": ["xut", "uvit", "dit", "mmdit"], "attention": ["full", "linear"]}
VARIANTS = {axis: FREE.get(axis, [n for n in discover()[axis].names() if n not in ("mix_ffn",)]) for axis in MODEL_AXES}


@settings(max_examples=40)
@given(order=st.permutations(range(12)), choices=st.fixed_dictionaries({a: st.sampled_from(v) for a, v in VARIANTS.items()}))
@shapes_unchecked()
def test_invariant_3_permuted_image_tokens_permute_the_output(order, choices):
    """With their positions, in every network that has no operation on the grid."""
    pinned = {axis: discover()[axis].get(name) for axis, name in choices.items()}
    for found in compat.refusals(pinned.values()):  # the needing side gives way to what its axis has by default
        choices.pop(found.needing.axis, None)
    made = architecture(**choices)
    assume(not list(compat.refusals(compat.chosen(made).values())))
    model = network(**choices).double()
    given = inputs(model, grid=(2, 6), dtype=torch.float64)
    before = to_patches(given.run(model))
    given.x = torch.nn.functional.fold(to_patches(given.x)[:, :, order], (4, 12), 2, stride=2)
    given.condition.position = given.condition.position[:, order]
    after = to_patches(given.run(model))
    torch.testing.assert_close(after, before[:, :, order], rtol=0, atol=1e-9 * before.abs().max().item())


def to_patches(x):
    return torch.nn.functional.unfold(x, 2, stride=2)
