"""Averages of the weights of any width, after training (EDM2's post-hoc EMA; docs/training.md).

usage: python -m hdm.ema ckpt=RUN_OR_CHECKPOINT width=W[,W ...] [at=SAMPLES] [out=FOLDER]
       python -m hdm.ema ckpt=RUN_OR_CHECKPOINT sweep [width=W,W ...] [at=SAMPLES] [out=FOLDER] [KEY=VALUE ...]

  python -m hdm.run ema.snapshot_every=2048                    train, and store averages of two widths now and then
  python -m hdm.ema ckpt=runs/NAME sweep                       validation loss over the width: a table, a figure
  python -m hdm.ema ckpt=runs/NAME width=0.07                  write that average, as runs/NAME/ema/0.07 (at=900: 0.07-at-900)
  python -m hdm.sample ckpt=runs/NAME/ema/0.07 prompt="…"      use it: hdm.sample, eval.*, hdm.export, guidance.ckpt
  python -m hdm.sample ckpt=runs/NAME weights=ema:0.07 …       the same without writing it

A width is the standard deviation of a power-function average's profile over the length of training (sigma_rel).

width=        widths; sweep has a list of its own
at=           samples seen at the moment that is averaged up to: the checkpoint's (the default) or an earlier snapshot's
out=          folder to write to; by default ema/ in the run folder
Also, for sweep: device, datasets, cache, train.precision. Widths that the snapshots are too far apart for are refused, or left out
of the sweep's own list. The losses are those of val/loss in training: the same images, noise and timesteps.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hdm import cli
from hdm.config.amend import amend, check_amendable
from hdm.config.errors import HdmError
from hdm.config.schema import RunConfig
from hdm.files import write_json

if TYPE_CHECKING:
    from hdm.train.checkpoint import Loaded
    from hdm.train.posthoc import Combination
    from hdm.train.snapshots import Source

_SWEPT = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.18, 0.22, 0.26)


@dataclass(kw_only=True, slots=True)
class Point:
    """One width: how it comes out of what is stored, and its validation loss."""

    width: float
    combination: "Combination"
    loss: float = math.nan


def command(arguments: list[str]) -> None:
    """Find the snapshots, then write or measure averages."""
    sweep = cli.take_flag(arguments, "sweep")
    values = {name: cli.take_option(arguments, name) for name in ("ckpt", "width", "at", "out")}
    if not values["ckpt"]:
        raise HdmError("ckpt= is missing; name a run folder or a checkpoint: python -m hdm.ema ckpt=runs/NAME sweep")
    if not sweep and not values["width"]:
        raise HdmError("width= is missing; name widths, width=0.05,0.1, or measure many: python -m hdm.ema ckpt=runs/NAME sweep")
    if not sweep:
        cli.reject_unknown(arguments, "see python -m hdm.ema --help")
    check_amendable(arguments)
    at = _whole("at", values["at"])

    from hdm.train import snapshots
    from hdm.train.checkpoint import load_model

    named = [snapshots.parse_width(text, key=f"width={values['width']}") for text in (values["width"] or "").split(",") if text]
    loaded = load_model(values["ckpt"], weights="raw")
    sources = snapshots.find(loaded.checkpoint, loaded.run.ema, samples=loaded.samples)
    moment = at or loaded.samples
    if moment not in (known := snapshots.moments(sources)):
        raise HdmError(f"at={moment}: no average was stored then; there are {', '.join(map(str, known))}")
    points = _points(sources, named, moment)
    out = Path(values["out"] or loaded.folder / "ema")
    if sweep:
        _sweep(loaded, amend(loaded.run, arguments), sources, points, moment=moment, out=out)
    else:
        _write(loaded, sources, points, moment=moment, out=out)


def _points(sources: "list[Source]", named: list[float], moment: int) -> list[Point]:
    """How each width comes out of the sources. One that was named and does not is refused; of a list of our own it is left out."""
    from hdm.train.posthoc import Profile
    from hdm.train.snapshots import LARGEST_RESIDUAL, check, plan

    points = []
    for width in named or _SWEPT:
        wanted = Profile(width=width, samples=moment)
        combination = plan(sources, wanted)
        if named:
            check(combination, wanted)
        if combination.residual <= LARGEST_RESIDUAL:
            points.append(Point(width=width, combination=combination))
    if not points:
        raise HdmError(f"at={moment}: too few snapshots are stored up to then; choose a later moment or train with more")
    return points


def _write(loaded: "Loaded", sources: "list[Source]", points: list[Point], *, moment: int, out: Path) -> None:
    """One folder a width that every command takes for a run with a checkpoint."""
    from hdm.config.compose import flatten
    from hdm.train import checkpoint
    from hdm.train.snapshots import synthesize

    parameters = len(list(loaded.model.parameters()))
    with cli.progress("averages", parameters, "tensors") as advance:
        averages = synthesize(sources, [point.combination for point in points], advance=advance)
    for point, tensors in zip(points, averages, strict=True):
        ema = dataclasses.replace(loaded.run.ema, power=point.width, decay=0.0, snapshot_every=0)
        config = flatten(dataclasses.replace(loaded.run, ema=ema))
        state = {"samples": moment, "config": config, "residual": point.combination.residual}
        folder = out / (f"{point.width:g}" if moment == loaded.samples else f"{point.width:g}-at-{moment}")
        checkpoint.save(folder, samples=moment, tensors={"ema-power": tensors}, state=state, keep=1)
        print(f"{folder}  at {moment:,} samples; {point.combination.residual:.2%} of the profile is missing")


def _sweep(loaded: "Loaded", run: RunConfig, sources: "list[Source]", points: list[Point], *, moment: int, out: Path) -> None:
    """Validation loss of every width, as a table, JSON and a figure."""
    from hdm.config.axes import DATA, OBJECTIVE
    from hdm.model import Architecture, build
    from hdm.train.adapters import adapted
    from hdm.train.checkpoint import load_weights
    from hdm.train.examples import Examples
    from hdm.train.loop import pick_device
    from hdm.train.snapshots import synthesize
    from hdm.train.validation import Validation

    device = pick_device(run.device)
    held_out = DATA.build(run.data).open(Path(run.datasets), "val")
    validation = Validation(run, held_out, Examples(run, device), OBJECTIVE.build(run.objective))
    raw = validation.losses(loaded.model.to(device)).mean().item() if moment == loaded.samples else None
    model = adapted(loaded.run, build(Architecture.of(loaded.run), seed=None)).to_empty(device=device)  # as it was trained
    with cli.progress("widths", len(points), "widths") as advance:
        for point in points:
            tensors = synthesize(sources, [point.combination])[0]
            load_weights(model, tensors, source=loaded.checkpoint)
            point.loss = validation.losses(model).mean().item()
            advance(1)
    _print(points, raw)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"sweep-{moment:09d}.json"
    rows = [{"width": p.width, "val/loss": p.loss, "residual": p.combination.residual} for p in points]
    write_json(path, {"samples": moment, "stored": list(run.ema.snapshot_powers), "val/loss_raw": raw, "widths": rows})
    title, figure = f"{loaded.folder.name}, {moment:,} samples", path.with_suffix(".png")
    _draw(points, raw, stored=run.ema.snapshot_powers, title=title, path=figure)
    print(f"{path}\n{figure}")


def _print(points: list[Point], raw: float | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    best = min(points, key=lambda point: point.loss)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("sigma_rel", "val/loss", "profile missing", ""):
        table.add_column(heading, justify="right")
    for p in points:
        table.add_row(f"{p.width:g}", f"{p.loss:.5f}", f"{p.combination.residual:.2%}", "lowest" if p is best else "")
    if raw is not None:
        table.add_row("raw", f"{raw:.5f}", "", "")
    Console(highlight=False).print(table)
    if best in (points[0], points[-1]):
        print("the lowest loss is at the edge: a width beyond it may be better (width=)")


def _draw(points: list[Point], raw: float | None, *, stored: list[float], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p.width for p in points], [p.loss for p in points], marker="o", label="made of snapshots")
    for i, width in enumerate(stored):
        axes.axvline(width, color="0.6", linestyle=":", label="stored" if i == 0 else None)
    if raw is not None:
        axes.axhline(raw, color="C1", linestyle="--", label="raw weights")
    axes.set_xscale("log")
    ticks = [p.width for p in points]
    axes.set_xticks(ticks, [f"{width:g}" for width in ticks])
    axes.minorticks_off()
    axes.set_xlabel("relative width of the average")
    axes.set_ylabel("validation loss")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise HdmError(f"{name}={text}: must be a whole number above 0")
    return int(text)


if __name__ == "__main__":
    cli.main(command, __doc__)
