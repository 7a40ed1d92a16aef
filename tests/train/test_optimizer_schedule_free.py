"""Schedule-Free AdamW against its equations in float64 and against its authors' package."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from updates import gradient, run, small, state_of

from hdm.config.axes import OPTIMIZER, SCHEDULE
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import EmaConfig
from hdm.train.checkpoint import load_model
from hdm.train.ema import DECAY, Averages
from hdm.train.loop import train
from hdm.train.optimizer import RateRule, ScheduleFreeConfig, clipped_step, set_rate
from hdm.train.schedule import ConstantConfig

STEPS, WARMUP = 12, 5
CONFIG = ScheduleFreeConfig(lr=0.02, rule=RateRule.constant, betas=[0.8, 0.97], weight_decay=0.3, eps=1e-6)


def warmed(model, config=CONFIG):
    """`STEPS` steps under a warm-up, whose gradients depend on where they are taken: 0.5 theta plus fixed noise."""
    optimizer, schedule = OPTIMIZER.build(config, model), SCHEDULE.build(ConstantConfig(warmup=WARMUP))
    for step in range(STEPS):
        set_rate(optimizer, schedule.factor(step=step + 1, progress=0.0))
        pull(model, step)
        clipped_step(optimizer, 0.0)
    return optimizer


def pull(model, step):
    for name, parameter in model.named_parameters():
        parameter.grad = 0.5 * parameter.detach() + gradient(name, parameter.shape, step).to(parameter.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_three_sequences_as_the_paper_has_them(dtype, tolerance):
    """x is written out as the mean of z_1 … z_t with weights f_1^2 … f_t^2, which the recursion only implies."""
    model = small(dtype=dtype)
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    optimizer = warmed(model)
    for (name, parameter), x in zip(model.named_parameters(), optimizer.evaluated(model), strict=True):
        z, y, v, past = start[name].copy(), start[name].copy(), np.zeros_like(start[name]), []
        for step in range(1, STEPS + 1):
            factor = min(1.0, step / WARMUP)
            g = 0.5 * y + gradient(name, start[name].shape, step - 1).double().numpy()
            v = 0.97 * v + 0.03 * g**2
            z = z - factor * 0.02 * (g / (np.sqrt(v / (1 - 0.97**step)) + 1e-6) + 0.3 * y)
            past.append((factor**2, z))
            mean = sum(w * each for w, each in past) / sum(w for w, _ in past)
            y = 0.2 * z + 0.8 * mean
        for ours, expected in ((parameter, y), (x, mean), (optimizer.state[parameter]["z"], z)):
            np.testing.assert_allclose(ours.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parity("`optimizer=schedule_free`, weights along the path", "schedulefree AdamWScheduleFree, float32")
def test_the_authors_package_takes_the_same_path():
    schedulefree = pytest.importorskip("schedulefree")
    model, reference = small(), small()
    ours = warmed(model)
    options = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3, "warmup_steps": WARMUP}
    theirs = schedulefree.AdamWScheduleFree(reference.parameters(), **options)
    theirs.train()
    for step in range(STEPS):
        pull(reference, step)
        theirs.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    theirs.eval()
    for x, b in zip(ours.evaluated(model), reference.parameters(), strict=True):
        torch.testing.assert_close(x, b.detach(), rtol=1e-5, atol=1e-6)


def test_the_average_finds_the_minimum_that_the_steps_only_circle():
    """On a noisy quadratic the iterate z keeps a distance that x does not."""
    model = small()
    optimizer = OPTIMIZER.build(ScheduleFreeConfig(lr=0.05, rule=RateRule.constant, weight_decay=0.0), model)
    for step in range(400):
        pull(model, step)
        clipped_step(optimizer, 0.0)
    x = torch.cat([t.flatten() for t in optimizer.evaluated(model)]).norm()
    z = torch.cat([optimizer.state[p]["z"].flatten() for p in model.parameters()]).norm()
    assert x < 0.7 * z


def test_averages_take_in_x():
    model = small()
    optimizer = OPTIMIZER.build(CONFIG, model)
    averages = Averages(model, EmaConfig(power=0.0, decay=0.5), weights=optimizer.evaluated(model))
    expected = [p.detach().double() for p in model.parameters()]
    for step in range(4):
        run(optimizer, model, 1, start=step)
        averages.update(samples=step + 1, fresh=1)
        expected = [0.5 * old + 0.5 * x.double() for old, x in zip(expected, optimizer.evaluated(model), strict=True)]
    for ours, theirs in zip(averages.tensors[DECAY], expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    trained = [p.detach().clone() for p in model.parameters()]
    with averages.applied(model, None):
        for parameter, x, y in zip(model.parameters(), optimizer.evaluated(model), trained, strict=True):
            assert torch.equal(parameter, x)
            assert not torch.equal(parameter, y)
    assert all(torch.equal(p, y) for p, y in zip(model.parameters(), trained, strict=True))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(clip, value, steps):
    model = small()
    optimizer = OPTIMIZER.build(CONFIG, model)
    run(optimizer, model, steps)
    before = state_of(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.down.weight.grad.fill_(value)
    assert not clipped_step(optimizer, clip).isfinite()
    after = state_of(optimizer, model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    run(optimizer, model, 2, start=steps)
    fresh = small()
    straight = OPTIMIZER.build(CONFIG, fresh)
    run(straight, fresh, steps + 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits(nano, listener, tmp_path):
    run = nano("optimizer=schedule_free", "schedule=constant", "schedule.warmup=2", "budget.steps=6", "train.checkpoint_every=8")
    straight = train(run, tmp_path / "straight", listener)
    whole = train(run, tmp_path / "run", listener)
    shutil.rmtree(whole.checkpoint)
    resumed = train(run, tmp_path / "run", listener)
    assert listener.rewound == [16]
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (straight, resumed))
        assert a == b, stem


def test_validation_and_checkpoints_hold_x(nano, listener, tmp_path):
    """x from the checkpoint's z alone: over three steps of a constant rate it is their mean, and the first z is a step away."""
    common = ["optimizer=schedule_free", "schedule=constant", "schedule.warmup=0", "ema.power=0", "ema.decay=0"]
    run = nano(*common, "budget.steps=3", "train.checkpoint_every=4", "train.keep_checkpoints=4", "train.validate_every=4")
    result = train(run, tmp_path / "run", listener)
    assert listener.series("val/loss") == listener.series("val/loss_raw")
    folders = sorted((tmp_path / "run" / "checkpoints").glob("samples-*"))[1:]
    z = [load_file(folder / "optimizer.safetensors") for folder in folders]
    x = load_file(folders[-1] / "model.safetensors")
    for name, tensor in x.items():
        mean = sum(each[f"{name}/z"].double() for each in z) / len(z)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, z[-1][f"{name}/z"]) for name, tensor in x.items())

    from hdm.config.axes import DATA, OBJECTIVE
    from hdm.train.examples import Examples
    from hdm.train.validation import Validation

    loaded = load_model(result.checkpoint, weights="raw").model
    held_out = DATA.build(run.data).open(tmp_path, "val")
    validation = Validation(run, held_out, Examples(run, torch.device("cpu")), OBJECTIVE.build(run.objective))
    again = validation.measure(loaded, Averages(loaded, run.ema))
    assert again["val/loss_raw"] == pytest.approx(result.metrics["val/loss_raw"], rel=1e-6)


def test_how_often_one_looks_changes_no_bit(nano, listener, tmp_path):
    common = ["optimizer=schedule_free", "schedule=constant", "schedule.warmup=2", "budget.steps=4"]
    often = train(nano(*common, "train.validate_every=4", "train.checkpoint_every=4"), tmp_path / "often", listener)
    never = train(nano(*common), tmp_path / "never", listener)
    for stem in ("model", "optimizer"):
        a, b = ((result.checkpoint / f"{stem}.safetensors").read_bytes() for result in (often, never))
        assert a == b, stem


def test_a_schedule_that_decays_is_refused():
    for schedule in ("cosine", "linear", "wsd"):
        with pytest.raises(ConfigError, match=r"optimizer=schedule_free: .*use schedule=constant"):
            compose(["optimizer=schedule_free", f"schedule={schedule}"])
    assert compose(["optimizer=schedule_free", "schedule=constant"]).optimizer.betas == [0.9, 0.999]
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        compose(["optimizer=schedule_free", "schedule=constant", "optimizer.lr=0"])
