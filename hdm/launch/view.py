"""Where people look at a sweep in MLflow."""

from typing import TYPE_CHECKING

from hdm.launch.arm import sweep_tag
from hdm.track.mlflow import Shipper

if TYPE_CHECKING:
    from hdm.launch.campaign import Sweep


def show(sweep: "Sweep", shipper: Shipper) -> list[str]:
    """The lines that say where the sweep's runs are to be seen."""
    search = f"tags.`{sweep_tag(sweep.name)}` = 'arm'"
    return shipper.link(search=search, metric=sweep.options.metric, ascending=sweep.options.direction.name == "minimize")
