import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm.config.axes import SCHEDULE
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.train.schedule import ConstantConfig, CosineConfig, Decay, LinearConfig, WsdConfig


def torch_factors(make, steps):
    """The rates that a scheduler of torch sets before each of `steps` updates of a parameter with rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def test_cosine_without_warmup_is_torchs():
    ours = SCHEDULE.build(CosineConfig(warmup=0, floor=0.01))
    theirs = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.01), 50)
    assert [ours.factor(step=k + 1, progress=k / 50) for k in range(50)] == pytest.approx(theirs, rel=1e-6)


def test_constant_warms_up_as_torchs_linear_rule():
    ours = SCHEDULE.build(ConstantConfig(warmup=10))
    theirs = torch_factors(lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9), 20)
    assert [ours.factor(step=k + 1, progress=k / 20) for k in range(20)] == pytest.approx(theirs, rel=1e-6)


def test_landmarks_of_the_cosine():
    cosine = SCHEDULE.build(CosineConfig(warmup=4, floor=0.2))
    assert cosine.factor(step=1, progress=0.0) == pytest.approx(0.25)
    assert cosine.factor(step=9, progress=0.5) == pytest.approx(0.6)
    assert cosine.factor(step=99, progress=1.0) == pytest.approx(0.2)
    assert cosine.factor(step=99, progress=1.7) == pytest.approx(0.2)


def test_linear_without_warmup_is_torchs_polynomial_of_power_one():
    ours = SCHEDULE.build(LinearConfig(warmup=0))
    theirs = torch_factors(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=50, power=1.0), 50)
    assert [ours.factor(step=k + 1, progress=k / 50) for k in range(50)] == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("shape", list(Decay))
def test_wsd_is_that_of_transformers(floor, shape):
    from transformers import get_wsd_schedule

    names = {Decay.one_minus_sqrt: "1-sqrt", Decay.linear: "linear"}
    counts = {"num_warmup_steps": 0, "num_stable_steps": 30, "num_decay_steps": 20}
    ours = SCHEDULE.build(WsdConfig(warmup=0, decay=0.4, shape=shape, floor=floor))
    theirs = torch_factors(lambda o: get_wsd_schedule(o, **counts, decay_type=names[shape], min_lr_ratio=floor), 50)
    assert [ours.factor(step=k + 1, progress=k / 50) for k in range(50)] == pytest.approx(theirs, rel=1e-6)


def test_landmarks_of_linear_and_wsd():
    linear = SCHEDULE.build(LinearConfig(warmup=4, floor=0.2))
    for step, progress, expected in ((1, 0.0, 0.25), (9, 0.5, 0.6), (99, 1.0, 0.2), (99, 1.7, 0.2)):
        assert linear.factor(step=step, progress=progress) == pytest.approx(expected)
    wsd = SCHEDULE.build(WsdConfig(warmup=4, decay=0.2, floor=0.1))
    for step, progress, expected in ((1, 0.0, 0.25), (9, 0.8, 1.0), (99, 0.85, 0.55), (99, 1.0, 0.1), (99, 1.7, 0.1)):
        assert wsd.factor(step=step, progress=progress) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(["cosine", "constant", "linear", "wsd"]), a=st.floats(0, 1), b=st.floats(0, 1), step=st.integers(1, 50))
def test_after_the_warmup_no_schedule_rises_or_leaves_the_unit_interval(name, a, b, step):
    schedule = SCHEDULE.build(SCHEDULE.get(name).config(warmup=20))
    late, early = (schedule.factor(step=99, progress=max(a, b)), schedule.factor(step=99, progress=min(a, b)))
    assert 0 <= late <= early <= 1
    assert schedule.factor(step=step, progress=a) == pytest.approx(min(1, step / 20) * schedule.factor(step=99, progress=a))


@pytest.mark.parametrize(
    "bad",
    [
        "schedule.warmup=-1", "schedule.floor=1.5", "schedule=linear schedule.floor=-0.1", "schedule=linear schedule.warmup=-1",
        "schedule=wsd schedule.decay=0", "schedule=wsd schedule.decay=1.5", "schedule=wsd schedule.floor=2",
        "schedule=wsd schedule.warmup=-1", "schedule=constant schedule.warmup=-1",
    ],
)  # fmt: skip
def test_values_outside_their_domain(bad):
    with pytest.raises(ConfigError, match=bad.split()[-1].split("=")[0]):
        compose(bad.split())
