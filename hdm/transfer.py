"""Do learning rates carry over from narrow to wide networks? What a sweep over widths, rates and seeds says, in words and a figure.

usage: python -m hdm.transfer sweep=FOLDER [sweep=FOLDER ...] [width=KEY] [rate=KEY] [metric=NAME] [out=FILE.png]

  python -m hdm.sweep sweep=lr_transfer                        the report's rule
  python -m hdm.sweep sweep=lr_transfer_constant               the control: one rate for every tensor and width
  python -m hdm.transfer sweep=runs/sweeps/A sweep=runs/sweeps/B

Learning rates transfer when the best rates of all widths lie within one octave and a wider network is better at every rate up to
the highest of them. That is said only of three widths, five rates and two seeds or more, rates an octave apart or closer, all arms
finished, and no best rate at the end of the grid; else the reasons are given why nothing can be said. A run that diverged has an
infinite loss.

width=model.width rate=optimizer.lr metric=val/loss     the swept keys, and what is minimised
out=          the figure, a panel a sweep, and a .json of the numbers beside it; by default transfer.png in the first sweep's folder
"""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from hdm import cli
from hdm.config.errors import DataError, HdmError
from hdm.files import write_json

_WIDTHS, _RATES, _SEEDS = 3, 5, 2  # fewer prove nothing (spec 10)
_OCTAVE = 1.001  # as log2, with room for rounding


@dataclass(kw_only=True, slots=True)
class Curves:
    """Losses of every seed by width and rate; `unfinished` counts arms without a loss."""

    title: str
    losses: dict[int, dict[float, list[float]]]
    unfinished: int = 0

    @property
    def widths(self) -> list[int]:
        """The widths, ascending."""
        return sorted(self.losses)

    @property
    def rates(self) -> list[float]:
        """The rates of any width, ascending."""
        return sorted({rate for row in self.losses.values() for rate in row})

    def mean(self, width: int, rate: float) -> float:
        """Over the seeds; infinite where one diverged or there is none."""
        return statistics.fmean(self.losses[width].get(rate) or [math.inf])

    def best(self, width: int) -> float:
        """The rate with the lowest mean loss."""
        return min(self.rates, key=lambda rate: self.mean(width, rate))

    def vertex(self, width: int) -> float | None:
        """Where the parabola through the best rate and its neighbours, over log2 rate, is lowest; None at the end of the grid."""
        at = self.rates.index(self.best(width))
        around = self.rates[at - 1 : at + 2] if at else []
        means = [self.mean(width, rate) for rate in around]
        if len(around) < 3 or not all(map(math.isfinite, means)):
            return None
        (x, y, z), (a, b, c) = (math.log2(rate) for rate in around), means
        over = (y - x) ** 2 * (b - c) - (y - z) ** 2 * (b - a)
        under = (y - x) * (b - c) - (y - z) * (b - a)
        return 2 ** (y - over / (2 * under)) if under else around[1]


@dataclass(kw_only=True, slots=True)
class Verdict:
    """Whether rates transfer (None: nothing can be said), and the sentence that says so."""

    transfers: bool | None
    words: str


def judge(curves: Curves) -> Verdict:
    """The claim of the module's docstring, with its numbers."""
    if doubts := _doubts(curves):
        return Verdict(transfers=None, words=f"cannot be said: {'; '.join(doubts)}")
    best = {width: curves.best(width) for width in curves.widths}
    octaves = math.log2(max(best.values()) / min(best.values()))
    upto = [rate for rate in curves.rates if rate <= max(best.values())]
    worse = [
        (narrow, wide, rate)
        for narrow, wide in itertools.pairwise(curves.widths)
        for rate in upto
        if not curves.mean(wide, rate) < curves.mean(narrow, rate)
    ]
    lowest = ", ".join(f"{rate:.3g} at width {width}" for width, rate in best.items())
    near = f"the best rates ({lowest}) lie {octaves:.0f} octave{'' if round(octaves) == 1 else 's'} apart"
    order = f"wider is better at every rate up to {upto[-1]:.3g}"
    if worse:
        narrow, wide, rate = worse[0]
        order = (
            f"wider is not better in {len(worse)} of {len(upto) * (len(best) - 1)} comparisons up to {upto[-1]:.3g} (at {rate:.3g}:"
            f" {curves.mean(wide, rate):.4g} at width {wide} against {curves.mean(narrow, rate):.4g} at width {narrow})"
        )
    good = octaves <= _OCTAVE and not worse
    return Verdict(transfers=good, words=f"{'transfers' if good else 'does not transfer'}: {near}; {order}")


def _doubts(curves: Curves) -> list[str]:
    """Why the sweep cannot answer."""
    widths, rates = curves.widths, curves.rates
    seeds = min((len(curves.losses[width].get(rate, [])) for width in widths for rate in rates), default=0)
    doubts = [
        f"{have} {name}{'' if have == 1 else 's'}, {need} are needed"
        for have, need, name in ((len(widths), _WIDTHS, "width"), (len(rates), _RATES, "rate"), (seeds, _SEEDS, "seed"))
        if have < need
    ]
    if curves.unfinished:
        doubts.append(f"{curves.unfinished} arms are not finished")
    if any(math.log2(high / low) > _OCTAVE for low, high in itertools.pairwise(rates)):
        doubts.append("rates are more than an octave apart")
    ends = {width: best for width in widths if (best := curves.best(width)) in (rates[0], rates[-1])} if len(rates) > 1 else {}
    for width, rate in ends.items():
        side = "lower" if rate == rates[0] else "higher"
        doubts.append(f"the best rate at width {width} is the end of the grid, {rate:.3g}; add {side} ones")
    return doubts


# --- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, *, width: str, rate: str, metric: str) -> Curves:
    """The curves of the sweep in `folder`. Raises DataError, in one line, for a folder that holds none."""
    path = folder / "table.csv"
    if not path.is_file():
        raise DataError(f"sweep={folder}: holds no table.csv; name the folder of a sweep that has been run (runs/sweeps/NAME)")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in (width, rate, metric):
        if rows and key not in rows[0]:
            raise DataError(f"{path}: has no column '{key}'; name the swept keys and what was measured: width= rate= metric=")
    losses: dict[int, dict[float, list[float]]] = {}
    unfinished = 0
    for row in rows:
        loss = _loss(row, metric)
        cell = losses.setdefault(round(_number(row, width, path)), {}).setdefault(_number(row, rate, path), [])
        if loss is None:
            unfinished += 1
        else:
            cell.append(loss)
    return Curves(title=_title(rows, folder), losses=losses, unfinished=unfinished)


def _loss(row: dict[str, str], metric: str) -> float | None:
    """What the arm came to: infinity when it diverged, None when it is not there."""
    if row["status"] == "failed" and "finite" in row["reason"]:
        return math.inf
    return float(row[metric]) if row["status"] == "finished" and row[metric] else None


def _number(row: dict[str, str], key: str, path: Path) -> float:
    try:
        return float(row[key])
    except ValueError:
        raise DataError(f"{path}: {key}={row[key]} is no number; name the keys of widths and rates: width= rate=") from None


def _title(rows: Sequence[dict[str, str]], folder: Path) -> str:
    """The optimizer and its rule, as an arm's own configuration states them; the sweep's name where that is gone."""
    for row in rows:
        config = Path(row["folder"]) / "config.json"
        if config.is_file():
            flat = json.loads(config.read_text(encoding="utf-8"))
            return ", ".join(str(flat[key]) for key in ("optimizer", "optimizer.rule") if key in flat)
    return folder.name


# --- output -----------------------------------------------------------------------------------------------------------


def command(arguments: list[str]) -> None:
    """Read, judge, print, draw."""
    folders = [Path(text.removeprefix("sweep=")) for text in arguments if text.startswith("sweep=")]
    arguments = [text for text in arguments if not text.startswith("sweep=")]
    values = {name: cli.take_option(arguments, name) for name in ("width", "rate", "metric", "out")}
    cli.reject_unknown(arguments, "see python -m hdm.transfer --help")
    if not folders:
        raise HdmError("sweep= is missing; name the folder of a sweep: python -m hdm.transfer sweep=runs/sweeps/NAME")
    out = Path(values["out"] or folders[0] / "transfer.png")
    if out.suffix != ".png":
        raise HdmError(f"out={out}: must end in .png")
    width, rate, metric = values["width"] or "model.width", values["rate"] or "optimizer.lr", values["metric"] or "val/loss"
    panels = [read(folder, width=width, rate=rate, metric=metric) for folder in folders]
    verdicts = [judge(curves) for curves in panels]
    for curves, verdict in zip(panels, verdicts):
        _print(curves, verdict, metric)
    report = [_as_dict(curves, verdict, folder) for curves, verdict, folder in zip(panels, verdicts, folders)]
    write_json(out.with_suffix(".json"), {"metric": metric, "sweeps": report})
    _draw(panels, verdicts, metric=metric, path=out)
    print(f"{out}\n{out.with_suffix('.json')}")


def _as_dict(curves: Curves, verdict: Verdict, folder: Path) -> dict[str, object]:
    losses = {str(w): {f"{rate:g}": cell for rate, cell in sorted(row.items())} for w, row in sorted(curves.losses.items())}
    best = {str(w): {"rate": curves.best(w), "vertex": curves.vertex(w)} for w in curves.widths}
    return {
        "sweep": str(folder), "title": curves.title, "transfers": verdict.transfers, "verdict": verdict.words, "best": best,
        "losses": losses,
    }  # fmt: skip


def _print(curves: Curves, verdict: Verdict, metric: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{curves.title}: mean {metric} over seeds", title_justify="left")
    for heading in ("width", *(f"{rate:.3g}" for rate in curves.rates), "best", "vertex"):
        table.add_column(heading, justify="right", no_wrap=True)
    for width in curves.widths:
        best, vertex = curves.best(width), curves.vertex(width)
        cells = [f"{curves.mean(width, rate):.4f}" + ("*" if rate == best else " ") for rate in curves.rates]
        table.add_row(str(width), *cells, f"{best:.3g}", "-" if vertex is None else f"{vertex:.3g}")
    Console(highlight=False, width=max(80, 32 + 10 * len(curves.rates))).print(table)
    print(verdict.words)


def _draw(panels: Sequence[Curves], verdicts: Sequence[Verdict], *, metric: str, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(1 + 4.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    words = {True: "transfers", False: "does not transfer", None: "cannot be said"}
    for axes, curves, verdict in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, verdicts):
        for i, width in enumerate(curves.widths):
            shown = [rate for rate in curves.rates if math.isfinite(curves.mean(width, rate))]
            cells = [curves.losses[width][rate] for rate in shown]
            colour = colormaps["viridis"](0.85 * i / max(1, len(curves.widths) - 1))
            axes.fill_between(shown, [min(c) for c in cells], [max(c) for c in cells], color=colour, alpha=0.2, linewidth=0)
            axes.plot(shown, [curves.mean(width, rate) for rate in shown], marker=".", color=colour, label=f"width {width}")
            best = curves.best(width)
            axes.plot([best], [curves.mean(width, best)], marker="*", markersize=13, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        axes.set_title(f"{curves.title}: {words[verdict.transfers]}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title="mean and range of seeds", title_fontsize="x-small")
    figure.supylabel(metric, fontsize="medium")
    with BytesIO() as drawn:
        figure.savefig(drawn, dpi=90)
        Image.open(drawn).convert("RGB").quantize(64).save(path)  # a palette: a third of the size


if __name__ == "__main__":
    cli.main(command, __doc__)
