"""Guidance fairness: each checkpoint at its default guidance and at its own best one on a small declared grid, and the whole curve.

usage: python -m eval.guidance ckpt=A[,B,...] [guidance_grid=[1,2,3,5]] [by=kid|fid|alignment] [protocol=NAME] [KEY=VALUE ...]

  python -m eval.guidance ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.guidance ckpt=runs/CROSS,runs/CONCAT guidance_grid=[1,1.5,2,3,5] eval.samples=1000

An arm that likes little guidance loses a comparison at scale 3 for no fault of its own. For every scale of the grid, which is the
same for all arms, one image is drawn for each caption with the same noise. The table shows the default and the best scale `by`
the chosen metric; the best is chosen on the numbers that are shown, so it is a little too good, for every arm alike. The figure
is distance against alignment along the grid, the curve by which guidance trades one for the other.

guidance_grid=[1,2,3,5]    values of guidance.scale; the run's own is added
by=kid                     what is best: kid (least), fid (least) or alignment (most)
out=FILE.png               the figure; by default eval/guidance-….png in the first run folder
Also: eval.*, sampler.*, guidance.*, weights, device, datasets, cache, track.* (docs/evaluation.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.errors import HdmError, suggest

if TYPE_CHECKING:
    from eval.metrics import Subject

_BY = {"kid": ("kid/", min), "fid": ("fid/", min), "alignment": ("alignment/", max)}


@dataclass(kw_only=True, slots=True)
class Point:
    """One scale of one arm: its metrics by name and their protocols."""

    scale: float
    values: dict[str, float]
    protocols: dict[str, dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class Curve:
    """All scales of one arm."""

    label: str
    default: float
    points: list[Point]

    def best(self, name: str, by: str) -> Point:
        """The point with the best value of metric `name`."""
        return _BY[by][1](self.points, key=lambda point: point.values[name])

    def open_end(self, name: str, by: str) -> str:
        """The end of the grid that the best point is, such as "4, the largest"; "" when worse ones lie on either side.

        Scale 0, where captions do nothing, is no open end.
        """
        scale, scales = self.best(name, by).scale, [point.scale for point in self.points]
        if scale == max(scales):
            return f"{scale:g}, the largest"
        return f"{scale:g}, the least" if scale == min(scales) and scale > 0 else ""

    def at_default(self) -> Point:
        """The point of the run's own scale."""
        return next(point for point in self.points if point.scale == self.default)


def command(arguments: list[str]) -> None:
    """`python -m eval.guidance`."""
    ckpts = [text for text in (cli.take_option(arguments, "ckpt") or "").strip("[]").split(",") if text]
    by = cli.take_option(arguments, "by") or "kid"
    grid = _grid(cli.take_option(arguments, "guidance_grid") or "1,2,3,5")
    out = cli.take_option(arguments, "out")
    if not ckpts:
        raise HdmError("ckpt= is missing; name run folders or checkpoints: python -m eval.guidance ckpt=runs/A,runs/B")
    if by not in _BY:
        raise HdmError(f"by={by}: no such choice{suggest(by, _BY)} (options: {', '.join(_BY)})")
    from eval.command import subject, tracked

    curves = []
    for ckpt in ckpts:
        found = subject("guidance", list(arguments), ckpt=ckpt)
        if not hasattr(found.run.guidance, "scale"):
            raise HdmError(f"ckpt={ckpt}: its guidance has no scale to vary; add guidance=cfg")
        curves.append(tracked(found, lambda recorder, found=found: curve(found, grid, recorder)))  # type: ignore[misc]
    path = Path(out) if out else found.loaded.folder / "eval" / f"guidance-{found.loaded.samples:09d}.png"
    show(curves, by, path)


def curve(found: "Subject", grid: Sequence[float], recorder: Any) -> Curve:
    """Measure one arm at every scale of the grid and at its own."""
    import dataclasses

    from eval.metrics import measure

    default = float(found.run.guidance.scale)
    points = []
    for scale in sorted({*grid, default}):
        run = dataclasses.replace(found.run, guidance=dataclasses.replace(found.run.guidance, scale=scale))
        subject = dataclasses.replace(found, run=run)
        protocols: dict[str, dict[str, Any]] = {}
        values = measure(subject, ["fid", "clip"], recorder=recorder, protocols=protocols)
        points.append(Point(scale=scale, values=values, protocols=protocols))
    return Curve(label=found.loaded.folder.name, default=default, points=points)


def show(curves: Sequence[Curve], by: str, path: Path) -> None:
    """The table on the terminal, the curves as a figure and as JSON beside it. Raises HdmError for arms of different protocols."""
    from rich.console import Console
    from rich.table import Table

    from hdm.files import write_json
    from hdm.track.protocol import digest

    if not all(point.values for each in curves for point in each.points):
        return  # a process that only helps to draw
    _require_equal(curves)
    names = list(curves[0].points[0].values)
    judged = next(name for name in names if name.startswith(_BY[by][0]))
    columns = [name for name in names if not name.endswith("_real")]
    table = Table(title=f"Guidance: the default scale, and the best by {judged}, chosen on these numbers", title_justify="left")
    for column in ("metric", "arm"):
        table.add_column(column, overflow="fold")
    for column in ("default", "best"):
        table.add_column(column, justify="right", no_wrap=True)
    chosen = [(each.label, each.at_default(), each.best(judged, by)) for each in curves]
    for label, default, best in chosen:
        table.add_row("guidance.scale", label, f"{default.scale:g}", f"{best.scale:g}")
    for name in columns:
        for label, default, best in chosen:
            table.add_row(name, label, f"{default.values[name]:.4g}", f"{best.values[name]:.4g}")
    Console(soft_wrap=True).print(table)
    for each in curves:
        if end := each.open_end(judged, by):
            Console(stderr=True, soft_wrap=True).print(
                f"[bold yellow]{each.label}: the best scale by {judged} is {end} of the grid, so a better one may lie beyond;"
                " widen guidance_grid=\\[...][/]",
                highlight=False,
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(curves, names, path)
    found = [
        {
            "label": each.label,
            "default": each.default,
            "points": [
                {
                    "scale": p.scale,
                    "values": p.values,
                    "digests": {name: digest(own) for name, own in p.protocols.items()},
                }
                for p in each.points
            ],
        }
        for each in curves
    ]
    write_json(path.with_suffix(".json"), {"by": judged, "curves": found})
    print(path)


def _require_equal(curves: Sequence[Curve]) -> None:
    from hdm.track.protocol import require_equal

    for scale in {point.scale for each in curves for point in each.points}:
        found = {each.label: point.protocols for each in curves for point in each.points if point.scale == scale}
        for metric in next(iter(found.values())):
            require_equal({label: protocols.get(metric, {}) for label, protocols in found.items()}, metric=metric)


def _figure(curves: Sequence[Curve], names: Sequence[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    alignment = next(name for name in names if name.startswith("alignment/"))
    distances = [name for name in names if name.startswith(("fid/", "kid/"))]
    figure = Figure(figsize=(5 * len(distances), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, distance in enumerate(distances):
        axes = figure.add_subplot(1, len(distances), number + 1)
        for each in curves:
            x, y = ([point.values[name] for point in each.points] for name in (alignment, distance))
            axes.plot(x, y, marker="o", label=each.label)
            for point, left, up in zip(each.points, x, y):
                word = f"{point.scale:g}" + (" (default)" if point.scale == each.default else "")
                axes.annotate(word, (left, up), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.margins(x=0.15)
        axes.set(xlabel=f"{alignment} (more is better)", ylabel=f"{distance} (less is better)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Guidance scale along each curve", fontsize=10)
    figure.savefig(path, dpi=110)


def _grid(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.strip("[]").split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or any(value < 0 for value in values):
        raise HdmError(f"guidance_grid={text}: is no list of scales, such as guidance_grid=[1,2,3,5]")
    return values


if __name__ == "__main__":
    cli.main(command, __doc__)
