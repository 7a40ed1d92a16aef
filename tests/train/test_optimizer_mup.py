"""Textbook muP against the `mup` package of its authors, and against what its papers say of each tensor."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from updates import Small, small

from hdm.config.axes import OPTIMIZER
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.model import Architecture, build
from hdm.model.width import Growth, Role, at_width, growth
from hdm.train.optimizer import AdamWConfig, RateRule, clipped_step, rates

# Every way in which a parameter grows: fused, tables, scalars per head, learned frequencies, a width with a constant in it.
CASES = [
    [],
    ["merge=concat", "adaln=hyper", "encoding=learned_abs"],
    ["merge=weighted_add", "adaln=single", "encoding.learned=true", "attention.qk_norm=cosine"],
    ["merge=mp_cat", "adaln=per_layer", "norm=dynamic_tanh", "mlp=gelu", "attention.qk_norm=rms"],
]
BASE, WIDTH = 96, 192


def architecture(case, width=WIDTH):
    return at_width(Architecture.of(compose(["model=nano", *case])), width)


def by_name(optimizer, model, key):
    found = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("compensate", [False, True])
def test_rates_and_decays_are_those_of_the_mup_package(case, compensate):
    mup = pytest.importorskip("mup")
    model = build(architecture(case))
    base, delta = (build(architecture(case, width), seed=None) for width in (BASE, 2 * BASE))
    mup.set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    theirs = mup.MuAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    config = AdamWConfig(lr=1e-3 * BASE, rule=RateRule.mup, base_width=BASE, weight_decay=0.1, compensate_decay=compensate)
    ours = OPTIMIZER.build(config, model)

    expected, roles = by_name(theirs, model, "lr"), {name: each.role for name, each in growth(model).items()}
    decays = by_name(theirs, model, "weight_decay")
    for name, rate in by_name(ours, model, "lr").items():
        infinite = model.get_parameter(name).infshape.ninf()
        assert (roles[name] is Role.hidden) == (infinite == 2), name
        # mup leaves the output layer's rate and divides its result; we divide its rate (the test below compares the two)
        divisor = WIDTH / BASE if roles[name] is Role.output else 1.0
        assert rate == pytest.approx(expected[name] / divisor, rel=1e-12), name
        decay = by_name(ours, model, "weight_decay")[name]
        assert decay * rate == pytest.approx(decays[name] * expected[name] if compensate else 0.1 * rate, rel=1e-12), name
    assert [name for name, role in roles.items() if role is Role.output] == ["out.proj.weight"]


@pytest.mark.parity("`optimizer.rule=mup`, outputs along six steps", "mup MuAdam and MuReadout")
def test_the_output_layer_moves_as_under_mups_multiplier():
    mup = pytest.importorskip("mup")

    class WithReadout(Small):
        def __init__(self, width=6):
            super().__init__(width)
            self.leave = mup.MuReadout(width, 2, readout_zero_init=False)

    ours, theirs = small(24).double(), WithReadout(24)
    mup.set_base_shapes(theirs, WithReadout(6), delta=WithReadout(12), rescale_params=False)
    theirs.double().load_state_dict(ours.state_dict())
    with torch.no_grad():
        ours.leave.weight /= 4  # the width over the base width: what the multiplier does to the initial values
    config = AdamWConfig(lr=6 * 0.01, rule=RateRule.mup, base_width=6, eps=1e-30, weight_decay=0.0)
    optimizer = mup.MuAdam(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-30)
    mine = OPTIMIZER.build(config, ours)
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model, step in ((ours, lambda: clipped_step(mine, 0.0)), (theirs, optimizer.step)):
        outputs.append([])
        for _ in range(6):
            y = model.leave(model.down(torch.tanh(model.stacked(model.enter(x)))))
            outputs[-1].append(y.detach())
            model.zero_grad()
            (y - torch.sin(3 * x[:, :2])).square().mean().backward()
            step()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    assert (outputs[0][-1] - outputs[0][0]).abs().max() > 0.05


def test_roles_of_xut():
    """Read off the network: what maps a fixed number of channels to the width, the width to itself, and the width to pixels."""
    grown = growth(build(architecture([], 64), seed=None))
    roles = {name: each.role for name, each in grown.items()}
    inputs = {name for name, role in roles.items() if role is Role.input}
    assert inputs == {"patch.proj.weight", "text.proj.weight", "aspect.up.weight"}
    assert {name for name, role in roles.items() if role is Role.output} == {"out.proj.weight"}
    for name, role in roles.items():
        if name.endswith(".bias") or "norm" in name:
            assert role is Role.vector, name
    assert {roles[f"pre.0.{name}.weight"] for name in ("attn.qkv", "attn.out", "mlp.w12", "mlp.w3")} == {Role.hidden}
    assert roles["time.proj.weight"] is Role.hidden  # as many sines and cosines as channels
    assert grown["pre.0.mlp.w3.weight"] == Growth(role=Role.hidden, width=192, doubled=384)


def test_a_width_that_holds_a_constant_extrapolates_along_its_line():
    grown = growth(build(architecture(["adaln=hyper"], 64), seed=None))["adaln.enter.weight"]  # reads D + 32
    for base in (16, 64, 1024):
        assert grown.multiple(base / 64) == pytest.approx((64 + 32) / (base + 32))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 40), base=st.integers(1, 5000), lr=st.floats(1e-4, 10))
def test_both_rules_give_a_square_matrix_lr_over_d(width, base, lr):
    class Square(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.architecture = dataclasses.make_dataclass("A", ["size"])(dataclasses.make_dataclass("S", ["dim"])(dim))
            self.layer = nn.Linear(dim, dim)

        def wider(self):
            return Square(2 * self.architecture.size.dim)

    model = Square(width)
    mup, report = (rates(AdamWConfig(lr=lr, base_width=base, rule=rule), model) for rule in (RateRule.mup, RateRule.mup_report))
    assert mup["layer.weight"] == pytest.approx(lr / width) == report["layer.weight"]
    assert mup["layer.bias"] == pytest.approx(lr / base)


def test_compensated_every_tensor_decays_alike():
    model = small(24)
    before = [p.detach().clone() for p in model.parameters()]
    for rule in (RateRule.mup, RateRule.mup_report):
        config = AdamWConfig(lr=0.5, rule=rule, base_width=8, weight_decay=0.3, compensate_decay=True)
        optimizer = OPTIMIZER.build(config, model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        clipped_step(optimizer, 1.0)
        before = [old * (1 - 0.5 / 8 * 0.3) for old in before]
        torch.testing.assert_close([p.data for p in model.parameters()], before, rtol=1e-6, atol=1e-7)


def test_a_network_of_unknown_growth_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"no method wider\(\).*optimizer.rule=mup_report"):
        OPTIMIZER.build(AdamWConfig(rule=RateRule.mup), nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"width 100: .*choose a multiple of 32"):
        architecture([], 100)
    with pytest.raises(ConfigError, match=r"optimizer.base_width=0: must be 1 or above"):
        compose(["optimizer.base_width=0"])
