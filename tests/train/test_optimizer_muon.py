"""Muon against torch.optim.Muon, and its iteration against the singular value decomposition."""

import shutil

import pytest
import torch
from updates import HIDDEN, gradient, run, small, state_of

from hdm.config.axes import OPTIMIZER
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.model import Architecture, build
from hdm.train.loop import train
from hdm.train.optimizer import Adjust, MuonConfig
from hdm.train.orthogonal import COEFFICIENTS, orthogonalize


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 8)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_acts_on_singular_values_alone(shape, steps):
    draw = torch.Generator().manual_seed(3)
    matrices = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3)]
    a, b, c = COEFFICIENTS
    for matrix, result in zip(matrices, orthogonalize(matrices, steps=steps, dtype=torch.float64), strict=True):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(steps):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result, u @ torch.diag(s) @ vt, rtol=1e-9, atol=1e-10)
        if steps == 5:
            assert s.min() > 0.6
            assert s.max() < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjust", list(Adjust))
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_hidden_matrices_move_as_under_torchs_muon(adjust, split, nesterov):
    config = MuonConfig(hidden_lr=0.05, hidden_decay=0.1, momentum=0.9, adjust=adjust, split=split, nesterov=nesterov)
    model = small(16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(OPTIMIZER.build(config, model), model, 5)
    for name in HIDDEN:
        pieces = start[name].chunk(2 if split and name == "stacked.weight" else 1)
        theirs = [torch.nn.Parameter(piece.clone()) for piece in pieces]
        options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1, "adjust_lr_fn": adjust.value}
        optimizer = torch.optim.Muon(theirs, lr=0.05, **options)
        for step in range(5):
            for parameter, part in zip(theirs, gradient(name, start[name].shape, step).chunk(len(theirs)), strict=True):
                parameter.grad = part.clone()
            optimizer.step()
        moved = torch.cat([t.detach() for t in theirs]) - start[name]
        error = (model.get_parameter(name).detach() - start[name] - moved).norm() / moved.norm()
        assert error < 5e-3, (name, error)  # bf16 holds 8 bits


def test_all_others_move_as_under_adamw():
    config = MuonConfig(lr=0.5, betas=[0.8, 0.95], weight_decay=0.3)
    model, reference = small(), small()
    run(OPTIMIZER.build(config, model), model, 5)
    fans = {"enter.weight": 3, "enter.bias": 6, "down.bias": 6, "leave.weight": 6, "leave.bias": 2}
    groups = [{"params": [reference.get_parameter(name)], "lr": 0.5 / fan} for name, fan in fans.items()]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.3, foreach=False, fused=False)
    for step in range(5):
        for name, parameter in reference.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        theirs.step()
    for name in fans:
        torch.testing.assert_close(model.get_parameter(name), reference.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert set(fans) | HIDDEN == dict(model.named_parameters()).keys()


def test_what_is_hidden_in_xut_and_what_is_stacked():
    model = build(Architecture.of(compose(["model=nano"])))
    optimizer = OPTIMIZER.build(MuonConfig(), model)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)]: group["parts"] for group in optimizer.hidden for p in group["params"]}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices - hidden.keys() == {"text.proj.weight", "aspect.up.weight", "out.proj.weight"}
    assert hidden.keys() <= matrices
    parts = {"attn.qkv": 3, "merge.attn.kv": 2, "mlp.w12": 2}
    for name, count in hidden.items():
        assert count == next((n for end, n in parts.items() if name.endswith(f"{end}.weight") and "adaln" not in name), 1), name
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == names.keys()


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_the_norm_is_that_of_all_gradients(scale):
    """Clipping multiplies the AdamW part; a matrix's own size is lost when it is orthogonalized."""
    config = MuonConfig(eps=1e-3)
    model, reference = small(), small()
    norm = run(OPTIMIZER.build(config, model), model, 1, clip=1.5, scale=scale)
    expected = torch.sqrt(sum(gradient(n, p.shape, 0, scale).square().sum() for n, p in reference.named_parameters()))
    torch.testing.assert_close(norm, expected)
    run(OPTIMIZER.build(config, reference), reference, 1, scale=scale * min(1.0, 1.5 / expected.item()))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=1e-3 if name in HIDDEN else 1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", ["stacked.weight", "enter.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(clip, value, where):
    model = small()
    optimizer = OPTIMIZER.build(MuonConfig(), model)
    run(optimizer, model, 2)
    before = state_of(optimizer, model)
    for name, parameter in model.named_parameters():
        parameter.grad = gradient(name, parameter.shape, 2)
    model.get_parameter(where).grad.fill_(value)
    from hdm.train.optimizer import clipped_step

    assert not clipped_step(optimizer, clip).isfinite()
    after = state_of(optimizer, model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    run(optimizer, model, 1, start=2)
    fresh = small()
    straight = OPTIMIZER.build(MuonConfig(), fresh)
    run(straight, fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_resumed_run_ends_with_the_same_bits(nano, listener, tmp_path):
    run = nano("optimizer=muon", "budget.steps=6", "train.checkpoint_every=8")
    straight = train(run, tmp_path / "straight", listener)
    whole = train(run, tmp_path / "run", listener)
    shutil.rmtree(whole.checkpoint)
    resumed = train(run, tmp_path / "run", listener)
    assert listener.rewound == [16]
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert a == b, stem


@pytest.mark.parametrize("bad", ["hidden_lr=0", "hidden_decay=-1", "momentum=1", "ns_steps=0", "lr=0"])
def test_values_outside_their_domain(bad):
    with pytest.raises(ConfigError, match="optimizer." + bad.split("=")[0]):
        compose(["optimizer=muon", "optimizer." + bad])
