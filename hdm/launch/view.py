"""Where people look at a sweep in MLflow: a saved view of its arms, and the pictures with its own run."""

from typing import TYPE_CHECKING, Any

from hdm.launch.arm import setting_tag, sweep_tag
from hdm.launch.pictures import FILE
from hdm.track.events import redact
from hdm.track.mlflow import Shipper
from hdm.track.replica import reason, say
from hdm.track.saved_view import SavedView, tried
from hdm.track.uri import connect

if TYPE_CHECKING:
    from hdm.launch.campaign import Sweep
    from hdm.launch.ranking import Ranking

_MOST_BARS = 4


def page(sweep: "Sweep", shipper: Shipper, ranking: "Ranking") -> dict[str, Any]:
    """What `hdm.track.uri.fragment` opens the sweep's comparison by: a saved view, or the plain list where none can be written."""
    search = f"tags.`{sweep_tag(sweep.name)}` = 'arm'"
    metric, ascending = sweep.options.metric, sweep.options.direction.name == "minimize"
    plain: dict[str, Any] = {"search": search, "metric": metric, "ascending": ascending}
    uri, experiment, parent = shipper.place
    if not experiment:
        return plain
    repeated = ranking.seeds > 1
    view = SavedView(
        name=sweep.name,
        search=search,
        metric=metric,
        ascending=ascending,
        group=setting_tag(sweep.name) if repeated else "",
        parameters=() if repeated else [key for axis in sweep.axes.values() for key in _keys(axis.key, sweep)],
        bars=[metric, *ranking.others()][:_MOST_BARS],
        curves=list(dict.fromkeys([metric, "val/loss", "train/loss"])),
        images=[("samples/grid", step)] if not repeated and (step := _last_picture(sweep)) else [],
        expanded=[parent],
    )
    try:
        return {"view": view.save(connect(uri), experiment)} if tried(uri) else plain
    except Exception as error:  # whatever it is, the sweep is done, and the plain list shows the same runs
        say(f"no saved view: {reason(error)}")
        return plain


def pictures(sweep: "Sweep", shipper: Shipper) -> list[str]:
    """The line that says where the table of pictures is."""
    uri, experiment, run = shipper.place
    if not run or not (sweep.folder / FILE).exists():
        return []
    server = redact(uri) if uri.startswith("http") else "http://127.0.0.1:5000"
    return [f"pictures: {server}/#/experiments/{experiment}/runs/{run}/artifacts/{FILE}"]


def _keys(axis: str, sweep: "Sweep") -> list[str]:
    """The parameters that an axis moves: its own, or those of a bundle."""
    choices = sweep.axes[axis].choices
    return list(dict.fromkeys(key for choice in choices for key in choice.lines)) or [axis]


def _last_picture(sweep: "Sweep") -> int:
    """The step of the last sample grid that any arm drew; 0 without one."""
    grids = (path.stem for arm in sweep.arms for path in (arm.folder / "samples").glob("samples-*.png"))
    return max((int(stem.partition("-")[2]) for stem in grids), default=0)
