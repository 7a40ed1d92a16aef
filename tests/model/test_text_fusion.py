"""Text fusions: which blocks have weights of their own for text, and what their ends are (spec 6)."""

import pytest
import torch
from nano import CONTEXT, architecture, inputs, network
from torch.nn import functional as F

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


@pytest.mark.parametrize("padded", [False, True])
def test_registers_are_text_that_is_learned(padded):
    """Two of them do what two more text tokens with these states do, and learn."""
    model = network(**PLAIN, text_fusion=("double", {"share": 0.5, "registers": 2}))
    plain = network(**PLAIN, text_fusion=("double", {"share": 0.5}))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "text.registers"})
    given, more = inputs(model, padded=padded), torch.randn(2, CONTEXT, generator=torch.Generator().manual_seed(1))
    model.text.registers.data.copy_(plain.text.proj(more))
    got = given.run(model)
    got.square().sum().backward()
    assert model.text.registers.grad.abs().min() > 0
    c = given.condition
    c.text, c.text_mask = torch.cat([c.text, more.expand(2, -1, -1)], dim=1), F.pad(c.text_mask, (0, 2), value=True)
    torch.testing.assert_close(got, given.run(plain), rtol=0, atol=1e-5)


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
