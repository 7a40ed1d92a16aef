"""What was planned stands beside what was measured."""

import pytest

from hdm.config.compose import compose
from hdm.plan import plan, planned

NANO = [
    "experiment=none",
    "model=nano",
    "text_encoder=hash",
    "autoencoder=pixel",
    "crop.size=16",
    "model.patch=4",
    "budget.steps=100",
]
MEASURED = {"cost/seconds": 1800.0, "cost/gpu_hours": 1.0}  # two devices for half an hour


def test_planned_hours_are_of_as_many_devices_as_ran():
    run = compose([*NANO, "hardware.peak_tflops=0.001", "hardware.devices=4"])
    (stage,) = plan(run).stages
    assert stage.gpu_hours(run.hardware) == stage.hours * 4
    assert planned(run, MEASURED) == {"cost/planned_hours": pytest.approx(stage.hours * 4 / 2)}


@pytest.mark.parametrize(
    ("lines", "measured"),
    [([], MEASURED), (["hardware.peak_tflops=1"], {}), (["hardware.peak_tflops=1", "budget.steps=null"], MEASURED)],
    ids=["no-peak", "nothing-trained", "no-end"],
)
def test_nothing_is_planned_without_a_peak_an_end_or_a_run(lines, measured):
    assert planned(compose([*NANO, *lines]), measured) == {}
