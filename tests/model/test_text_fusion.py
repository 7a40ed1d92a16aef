"""Text fusions: which blocks have weights of their own for text, and what their ends are (spec 6)."""

import pytest
import torch
from nano import architecture, inputs, network

from hdm.model import build

PLAIN = {"backbone": ("dit", {"blocks": 4}), "merge": "none", "routing": "none"}


@pytest.mark.parametrize(("share", "twins"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_twins_come_first(share, twins):
    model = network(**PLAIN, text_fusion=("double", {"share": share}))
    assert [block.twin for block in model.stack] == [True] * twins + [False] * (4 - twins)


@pytest.mark.parametrize(("share", "other"), [(0.0, "concat"), (1.0, "mmdit")])
def test_ends_of_double(share, other):
    """Bit for bit: names and seed decide the weights."""
    model = network(**PLAIN, text_fusion=("double", {"share": share}))
    given = inputs(model)
    assert torch.equal(given.run(model), given.run(network(**PLAIN, text_fusion=other)))


def test_gated_cross_attention_shares_the_modulation_of_the_merge():
    """4,196,864 weights a block: 4 D^2 + D, 512 frequencies (16 heads of 32), a norm's 1,024 gains (spec 6)."""
    model = network(text_fusion="cross_attn_gated")
    assert set(model.adaln.heads) == {"attn", "merge", "mlp"}
    modulation = model.adaln(torch.randn(2, 1, 32))
    assert torch.equal(modulation["encoder.0.0.text.merge"].scale, modulation["decoder.0.0.merge"].scale)
    size = {"dim": 1024, "heads": 16, "head_dim": 64, "mlp_dim": 3072}
    with torch.device("meta"):
        a = architecture(size=size, text_fusion="cross_attn_gated", encoding=("axial_rope", {"fraction": 1.0, "learned": True}))
        block = build(type(a)(**{f: getattr(a, f) for f in a.__slots__} | {"context_dim": 1024})).encoder[0][0]
    assert sum(p.numel() for p in [*block.text.parameters(), *block.text_norm.parameters()]) == 4_196_864
