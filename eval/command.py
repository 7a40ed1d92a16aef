"""What the commands of eval/ share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hdm import cli
from hdm.config.amend import check_amendable
from hdm.config.errors import HdmError

if TYPE_CHECKING:
    from eval.metrics import Subject
    from hdm.train.recorder import Recorder

T = TypeVar("T")


def run(metric: str | Sequence[str], arguments: list[str], *, command: str = "") -> None:
    """Evaluate one metric, or several of which some may be left out; print the table, and send the numbers to the tracker."""
    several = not isinstance(metric, str)
    found = subject(command or str(metric), arguments)
    from eval.metrics import measure

    names = list(metric) if several else [str(metric)]
    tracked(found, lambda recorder: measure(found, names, recorder=recorder, skip=several))


def subject(command: str, arguments: list[str], *, ckpt: str | None = None) -> "Subject":
    """The checkpoint that the arguments name, with its run as they change it; plug-ins are loaded. Raises HdmError in one line."""
    ckpt = ckpt or cli.take_option(arguments, "ckpt")
    weights = cli.take_option(arguments, "weights") or "ema"
    preset = cli.take_option(arguments, "protocol")
    reference = cli.take_option(arguments, "reference")
    plugins = cli.take_option(arguments, "plugins")
    if not ckpt:
        raise HdmError(f"ckpt= is missing; name a run folder or a checkpoint: python -m eval.{command} ckpt=runs/NAME")
    overrides = [*arguments, *([f"eval.reference={reference}"] if reference else [])]
    check_amendable(overrides)
    if preset:
        from eval import presets

        presets.lines(preset)
    if plugins:
        from hdm.config.compose import load_plugins

        load_plugins([f"plugins={plugins}"])
    from eval.metrics import load

    return load(ckpt, overrides=overrides, weights=weights, preset=preset)


def tracked(found: "Subject", act: "Callable[[Recorder | None], T]") -> T:
    """Do `act` with a recorder of the run, ship what it records, and say where that can be seen."""
    from eval.sampling import rank

    folder, track = found.loaded.folder, found.run.track
    if rank() > 0 or not (folder / "events.jsonl").exists():  # a helper, or a checkpoint that was copied out of its run
        return act(None)
    from hdm.track.events import EventLog
    from hdm.track.mlflow import Shipper

    shipper = Shipper(Path(folder), uri=track.uri, experiment=track.experiment, run_name=track.name, parent=track.parent)
    with shipper:
        result = act(EventLog(folder))
    print("\n".join(shipper.link()))
    return result
