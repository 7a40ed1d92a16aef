"""What every registered variant of every model axis owes, whoever adds it."""

import pytest
import torch
from nano import MODEL_AXES, architecture, inputs, network, shapes_unchecked

from hdm.config.axes import discover
from hdm.config.schema import QKNorm
from hdm.model import build
from hdm.model.adaln import Activation, Gate, Triples
from hdm.model.encoding import Order, Pairs, Spacing, TextPosition
from hdm.model.merge import GateOf, Pairing, Start
from hdm.model.position import Edges, Interpolation, Origin
from hdm.model.xut import Residual

# Every variant with its defaults, and every option that takes another path through the code.
CASES = [{axis: name} for axis in MODEL_AXES for name in discover()[axis].names()] + [
    {"backbone": ("xut", {"residual": Residual.normed})},
    {"merge": ("cross", {"pairing": Pairing.deepest})},
    {"merge": ("concat", {"pairing": Pairing.deepest})},
    {"merge": ("weighted_add", {"both": True})},
    {"merge": ("mp_cat", {"t": 0.3})},
    *({"attention": ("full", {"qk_norm": kind}), "merge": ("cross", {"qk_norm": kind})} for kind in list(QKNorm)[1:]),
    {"mlp": ("gelu", {"width": 1.0})},
    {"norm": "dynamic_tanh", "adaln": "scale_only"},
    {"norm": "layer", "backbone": ("xut", {"residual": Residual.normed})},
    {"merge": ("concat", {"start": Start.normal})},
    {"merge": ("gated", {"gate": GateOf.channel})},
    {"norm": ("rms", {"affine": False})},
    {"norm": ("layer", {"affine": False}), "adaln": ("per_layer", {"gate": Gate.zero, "activation": Activation.silu})},
    {"adaln": ("no_shift", {"activation": Activation.silu})},
    {"adaln": ("shared_one", {"activation": Activation.none})},
    {"adaln": ("scale_only", {"mapping": 2})},
    {"adaln": ("scale_only", {"gate": Gate.zero})},
    {"encoding": ("axial_rope", {"spacing": Spacing.lang, "order": Order.blocks, "sincos": True}), "position": "integer"},
    {"encoding": ("axial_rope", {"spacing": Spacing.log_open, "pairs": Pairs.half_split, "learned": True})},
    {"encoding": ("flux_rope", {"text": TextPosition.index})},
    {"position": ("integer", {"interpolation": Interpolation.base, "scale": 2.0}), "encoding": "sincos_abs"},
    {"position": ("rect1", {"origin": Origin.corner})},
    {"position": ("bbox", {"edges": Edges.resampled})},
    {"encoding": ("axial_rope", {"fraction": 1.0, "learned": True, "spacing": Spacing.constant})},
    {"adaln": ("shared_mlp1", {"triples": Triples.family})},
    {"adaln": ("shared_mlp1", {"triples": Triples.kind}), "merge": "add"},
    {"text_fusion": ("concat", {"mask": False})},
    {"text_fusion": ("concat", {"norm": True, "norm_gain": 0.5})},
    {"text_fusion": ("cross_attn", {"norm": True, "norm_gain": 0.5})},
    {"text_fusion": "cross_attn_gated", "encoding": ("axial_rope", {"learned": True})},
    {"text_fusion": "mmdit", "attention": ("full", {"qk_norm": QKNorm.rms, "qkv_bias": True}), "adaln": "per_layer"},
    {"text_fusion": "mmdit", "adaln": "none"},
    {"text_fusion": "double", "adaln": "scale_only"},
    {"text_fusion": "mmdit", "size": {"post_depth": 0}},
    {"text_fusion": "mmdit", "routing": "deferred_mask"},
    {"attention": ("full", {"qkv_bias": True})},
    {"routing": ("tread", {"ordered": False})},
    {"size": {"post_depth": 0, "pre_depth": 0, "enc_blocks": 2}},
    *(
        {"adaln": (name, {"gate": gate})}
        for name in ("shared", "shared_mlp1", "shared_one", "per_layer", "no_shift", "single", "hyper")
        for gate in (Gate.zero, Gate.none)
    ),
]
# Decoder 0 starts from the very state that it merges, and between equals lerp has nothing to choose.
IDLE = ("decoder.0.0.merge.factor",)
# Shapes are checked where gradients are, routed and not, on every case; elsewhere only the numbers are.
every_variant = pytest.mark.parametrize("case", CASES, ids=str)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_variant
@shapes_unchecked()
def test_builds_on_meta_with_the_same_parameters(case):
    shapes = {n: p.shape for n, p in build(architecture(**case), seed=None).named_parameters()}
    assert shapes == {n: p.shape for n, p in network(**case).named_parameters()}


@every_variant
@pytest.mark.parametrize(("grid", "routed"), [((4, 4), False), ((2, 6), True)])
def test_gradients_reach_every_parameter(case, grid, routed):
    model = network(**case)
    given = inputs(model, grid=grid)
    out = given.run(model, routed=routed)
    assert out.shape == given.x.shape
    out.square().sum().backward()
    for name, p in model.named_parameters():
        if name == "routing.mask_token" and not routed:
            assert p.grad is None, "no token is away, so none is replaced"
            continue
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() == (name not in IDLE), f"{name} takes no part"


@every_variant
@shapes_unchecked()
def test_bf16_autocast_agrees_with_fp32(case):
    model = network(**case)
    given = inputs(model)
    exact = given.run(model, routed=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = given.run(model, routed=True)
    low.square().sum().backward()
    assert low.dtype == given.x.dtype
    assert (low - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_variant
@shapes_unchecked()
def test_gradient_checkpointing_changes_no_gradient(case):
    size = case.get("size", {})
    models = [network(**{**case, "size": {**size, "gradient_checkpointing": on}}) for on in (False, True)]
    for model in models:
        inputs(model).run(model, routed=True).square().sum().backward()
    plain, recomputed = map(grads, models)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@every_variant
@shapes_unchecked()
def test_state_dict_round_trip_and_determinism(case):
    model, other = network(**case), network(seed=1, **case)
    given = inputs(model)
    with torch.no_grad():
        assert not torch.equal(given.run(model), given.run(other))
        other.load_state_dict(model.state_dict())
        for routed in (False, True):
            assert torch.equal(given.run(model, routed=routed), given.run(other, routed=routed))


@every_variant
@shapes_unchecked()
def test_images_of_a_batch_do_not_meet(case):
    """In float64: in float32 one image may take other kernels than three."""
    model = network(**case).double()
    given = inputs(model, batch=3, dtype=torch.float64)
    with torch.no_grad():
        together = given.run(model)
        for i in range(3):
            rows = slice(i, i + 1)
            alone = model(given.x[rows], given.timestep[rows], given.condition[rows])
            torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-10)


@every_variant
@shapes_unchecked()
def test_shared_parameters_start_bit_identical(case):
    """Two arms of a sweep with the same seed begin at the same weights, but for what adaln=scale_only defines to begin at zero."""
    default = dict(network(perturbed=False).named_parameters())
    model = network(perturbed=False, **case)
    ours, own = dict(model.named_parameters()), model.initial()
    adaln = model.adaln if hasattr(model, "adaln") else model.level(0).adaln
    assert not own or adaln.zero_outputs
    if model.architecture.backbone.zero_output:  # is defined to begin at zero
        ours = {name: p for name, p in ours.items() if not name.startswith("out.proj.")}
    shared = [name for name in ours if name in default and ours[name].shape == default[name].shape and name not in own]
    # What another backbone implies leaves little to share but the entrance.
    assert len(shared) > (50 if "backbone" not in case or case["backbone"] == "xut" else 5) or "size" in case
    for name in shared:
        assert torch.equal(ours[name], default[name]), name


@pytest.mark.parametrize("case", [c for c in CASES if "text_fusion" not in c], ids=str)
@shapes_unchecked()
def test_padding_text_changes_nothing(case):
    model = network(**case)
    given = inputs(model, padded=False)
    exact = given.run(model)
    c = given.condition
    c.text = torch.cat([c.text, torch.full((2, 4, c.text.shape[2]), 100.0)], dim=1)
    c.text_mask = torch.cat([c.text_mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(given.run(model), exact, rtol=1e-4, atol=1e-5)


def test_without_the_mask_padding_is_attended_to():
    model = network(text_fusion=("concat", {"mask": False}))
    given = inputs(model)
    before = given.run(model)
    given.condition.text[-1, -1] += 1
    after = given.run(model)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_wrong_shapes_are_named():
    model = network()
    given = inputs(model)
    with pytest.raises(ValueError, match="9 x 8: both sides must be multiples of the patch side 2"):
        model(torch.zeros(2, 4, 9, 8), given.timestep, given.condition)
    with pytest.raises(ValueError, match="16 positions for 24 image tokens"):
        model(torch.zeros(2, 4, 8, 12), given.timestep, given.condition)
