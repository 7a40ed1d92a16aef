"""Check that learning rates carry over from narrow to wide networks: the coordinate check of muP.

usage: python -m hdm.coordcheck [widths=64,128,256,512] [steps=4] [seeds=4] [rate=0.3] [out=coordcheck] [KEY=VALUE ...]

  python -m hdm.coordcheck                                     the default network and optimizer.rule=mup_report
  python -m hdm.coordcheck optimizer.rule=mup                  textbook muP
  python -m hdm.coordcheck backbone=xut merge=concat           any axis: the parts that are watched are found in the network
  python -m hdm.coordcheck optimizer=muon widths=64,128,256

The network is trained for a few steps on fixed synthetic data at every width (heads of one size, more of them) and with every seed.
A part of it passes when the change of its output does not depend on the width: the slope of log2 mean |h_t - h_0| against log2
width lies within 0.2 of 0. rate= multiplies all learning rates, as a warm-up does. Beside it runs a control, AdamW with one rate
for all tensors and widths, which has to fail: a check that passes everything proves nothing.

Rules divide the steps of an Adam without epsilon. Gradients shrink as networks widen, and behind layers that start at zero they are
as small as epsilon: what fails at optimizer.eps=1e-8 may pass at optimizer.eps=1e-20. Such layers also move late: steps=8.

Writes coordcheck.json and coordcheck.png into the folder `out`. Exit code: 0 when every part passes and the control fails, else 1.
Sizes other than the width start from model=nano. What can be set: python -m hdm.variants [AXIS | keys].
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hdm import cli
from hdm.config.errors import HdmError
from hdm.config.schema import RunConfig
from hdm.files import write_json

if TYPE_CHECKING:
    from hdm.train.coordinates import Coordinates

_WIDTHS = "64,128,256,512"


def command(arguments: list[str]) -> int:
    """Measure, print, write; 0 when the rule passes and the control fails."""
    from hdm.config.compose import compose, flatten

    values = {name: cli.take_option(arguments, name) for name in ("widths", "steps", "seeds", "rate", "out")}
    widths = [_whole("widths", text) for text in (values["widths"] or _WIDTHS).strip("[]").split(",")]
    if len(set(widths)) < 2:
        raise HdmError(f"widths={values['widths']}: a slope needs two different widths or more, such as {_WIDTHS}")
    steps, seeds = _whole("steps", values["steps"] or "4"), _whole("seeds", values["seeds"] or "4")
    rate = _positive("rate", values["rate"] or "0.3")
    out = Path(values["out"] or "coordcheck")
    run = compose(["model=nano", *arguments])

    from hdm.train.coordinates import LIMIT, as_dict, control, measure

    widths = sorted(set(widths))
    with cli.progress("networks", 2 * len(widths) * seeds, "networks") as advance:
        chosen, other = (
            measure(run, optimizer, widths=widths, steps=steps, seeds=seeds, rate=rate, advance=advance)
            for optimizer in (run.optimizer, control(run, widths))
        )
    passed = not chosen.failing() and bool(other.failing())
    _print(chosen, other, title=_title(run), limit=LIMIT)

    out.mkdir(parents=True, exist_ok=True)
    report = {"passed": passed, "limit": LIMIT, "widths": widths, "steps": steps, "seeds": seeds, "rate": rate}
    report |= {"chosen": as_dict(chosen), "control": as_dict(other), "config": flatten(run)}
    write_json(out / "coordcheck.json", report)
    _draw(chosen, other, out / "coordcheck.png", title=_title(run))
    print(f"{out / 'coordcheck.json'}\n{out / 'coordcheck.png'}")
    print(_verdict(chosen, other))
    return 0 if passed else 1


def _whole(name: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise HdmError(f"{name}={text}: must be a whole number above 0")
    return int(text)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise HdmError(f"{name}={text}: must be a number above 0, such as 0.3")
    return value


def _title(run: RunConfig) -> str:
    from hdm.config.axes import BACKBONE, OPTIMIZER

    rule = getattr(run.optimizer, "rule", None)
    return f"{BACKBONE.of(run.backbone).name}, {OPTIMIZER.of(run.optimizer).name}" + (f", {rule.name}" if rule else "")


def _verdict(chosen: "Coordinates", other: "Coordinates") -> str:
    failing = chosen.failing()
    if failing:
        return f"FAILED: the change of {', '.join(failing)} depends on the width"
    if not other.failing():
        return "FAILED: one rate for all widths passes too, so this tells nothing; raise steps= or rate=, or spread widths="
    return (
        f"passed: no part's change depends on the width, while the control's does in {len(other.failing())} of {len(other.changes)}"
    )


def _print(chosen: "Coordinates", other: "Coordinates", *, title: str, limit: float) -> None:
    from math import log2

    from rich import box
    from rich.console import Console
    from rich.table import Table

    def slope(result: "Coordinates", name: str) -> str:
        value = result.slope(name)
        return "does not move" if value is None else f"{value:+.2f}"

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{title}: log2 mean |h_t - h_0|", title_justify="left")
    for heading in ("part", *map(str, chosen.widths), "slope", "", "control"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, by_step in chosen.changes.items():
        cells = [f"{log2(change):.2f}" if change > 0 else "-" for change in by_step[-1]]
        table.add_row(name, *cells, slope(chosen, name), "[red]FAILS" if name in chosen.failing() else "", slope(other, name))
    Console(highlight=False).print(table)
    print(f"within {-limit} … {limit} a slope passes; control: AdamW with one rate for all tensors and widths")


def _draw(chosen: "Coordinates", other: "Coordinates", path: Path, *, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, result, heading in ((left, chosen, title), (right, other, "control: one rate for all widths")):
        for i, (name, by_step) in enumerate(result.changes.items()):
            if result.slope(name) is not None:
                style = ("-", "--", ":")[i // 10 % 3]
                axes.plot(
                    result.widths, by_step[-1], style, marker="o", color=f"C{i % 10}", label=f"{name} {result.slope(name):+.2f}"
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(result.widths, [str(width) for width in result.widths])
        axes.set_xlabel("width")
        axes.set_title(heading)
        axes.legend(fontsize="x-small", ncols=2, handlelength=4)
        axes.grid(alpha=0.3)
    left.set_ylabel("mean |h_t - h_0|")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.main(command, __doc__)
