"""The two presets, and that each departure of the upstream code can be chosen alone (spec 0 and 1.3)."""

import pytest
import torch
from nano import CONTEXT, MODEL_AXES, Inputs, inputs, perturb

from hdm.config.compose import compose, flatten
from hdm.config.errors import ConfigError
from hdm.model import Architecture, build

NANO = ["model=nano", "model.dim=32", "model.mlp_dim=48", "model.head_dim=16"]


def network(*overrides, perturbed=True):
    architecture = Architecture.of(compose([*NANO, *overrides]))
    architecture.in_channels, architecture.context_dim = 4, CONTEXT
    model = build(architecture)
    return perturb(model) if perturbed else model


def with_positions_of(model, given: Inputs) -> Inputs:
    given.condition.position = inputs(model, grid=(2, 6)).condition.position
    return given


def test_the_report_is_the_default():
    default, report = flatten(compose([])), flatten(compose(["preset=xut_report"]))
    differing = {key for key in default if default[key] != report[key]}
    assert differing == {"captions.text_dropout"}
    assert report["captions.text_dropout"] == 0


@pytest.mark.parametrize(
    "departure",
    [
        ["merge.pairing=deepest"],
        ["position=bbox"],
        ["position=bbox", "position.edges=resampled"],
        ["encoding.fraction=1"],
        ["encoding.spacing=constant"],
        ["backbone.residual=normed"],
        ["model.heads=4", "model.head_dim=8"],
        ["text_fusion.mask=false"],
        ["adaln=shared_mlp1"],
    ],
    ids="+".join,
)
def test_each_departure_alone_changes_the_velocity(departure):
    report, other = network(), network(*departure)
    given = inputs(report, grid=(2, 6))
    before = given.run(report)
    assert not torch.allclose(with_positions_of(other, given).run(other), before, atol=1e-4)


def test_learned_frequencies_start_where_the_fixed_ones_are():
    fixed, learned = network(perturbed=False), network("encoding.learned=true", perturbed=False)
    given = inputs(fixed)
    torch.testing.assert_close(given.run(learned), given.run(fixed), rtol=1e-5, atol=1e-6)


def test_upstream_is_all_of_them_at_once():
    flat = flatten(compose(["preset=xut_upstream"]))
    chosen = {k: v for k, v in flat.items() if k.split(".")[0] in MODEL_AXES or k in ("model.heads", "model.head_dim")}
    assert chosen == {
        "backbone": "xut", "backbone.residual": "normed", "merge": "cross", "merge.pairing": "deepest", "adaln": "shared",
        "adaln.gate": "one_plus", "merge.qk_norm": "none", "norm": "rms", "attention": "full", "attention.qk_norm": "none",
        "attention.qkv_bias": False,
        "mlp": "swiglu", "position": "bbox", "position.edges": "resampled", "encoding": "axial_rope",
        "encoding.fraction": 1.0, "encoding.learned": True, "encoding.spacing": "constant", "encoding.low": 1.0,
        "encoding.high": 5.0, "routing": "tread", "routing.rate": 0.5, "text_fusion": "concat", "text_fusion.mask": False,
        "routing.ordered": True, "routing.routes": 1, "text_fusion.norm": False,
        "text_fusion.norm_gain": 0.01,
        "norm.affine": True, "backbone.final_norm": False, "backbone.final": "none", "backbone.zero_output": False,
        "encoding.base": 16, "encoding.theta": 1e4, "encoding.order": "alternating",
        "encoding.pairs": "interleaved", "encoding.sincos": False,
        "model.heads": 16, "model.head_dim": 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoding.fraction=0.3"], r"encoding\.fraction=0\.3: turns 4\.8 of model\.head_dim=16 channels; choose a fraction"),
        (["encoding.fraction=1.25"], r"encoding\.fraction=1\.25: .* in \(0, 1\]"),
        (["encoding.low=6"], r"encoding\.low=6\.0: must be above 0 and at most encoding\.high=5\.0"),
        (["encoding=learned_abs", "encoding.extent=0.5"], r"encoding\.extent=0\.5: must be 1 or above"),
        (["encoding=sincos_abs", "encoding.base=0"], r"encoding\.base=0: must be above 0"),
        (
            ["encoding=learned_abs", "encoding.text=77", "text_fusion=cross_attn"],
            r"encoding\.text=77: .* no text token is in the sequence; use encoding\.text=0, or text_fusion=concat",
        ),
        (
            ["encoding=flux_rope", "encoding.text=index", "text_fusion=cross_attn_gated"],
            r"encoding\.text=index: .* use encoding\.text=nope, or text_fusion=concat",
        ),
        (["routing.rate=1"], r"routing\.rate=1\.0: must be at least 0 and below 1"),
        (["merge.pairing=mirrored"], r"merge\.pairing=mirrored: expected one of mirror, deepest"),
        (["merge=mp_sum", "merge.t=1.5"], r"merge\.t=1\.5: must be between 0, the stream alone, and 1"),
        (
            ["mlp=gelu", "mlp.width=0.33"],
            r"mlp\.width=0\.33: makes 15\.84 of model\.mlp_dim=48 channels; choose one that makes a whole",
        ),
        (["adaln=hyper", "adaln.width=0"], r"adaln\.width=0\.0: makes no channels of model\.dim=32; use 1"),
        (["adaln=hyper", "adaln.layers=-1"], r"adaln\.layers=-1: must be 0 or above"),
        (["attention.qk_norm=l2"], r"attention\.qk_norm=l2: expected one of none, rms, layer, cosine"),
        (["merge=croos"], r"merge=croos: no such variant; did you mean 'cross'\?"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        compose([*NANO, *overrides])
    assert "\n" not in str(error.value)
