"""The figures: differences with the noise band, learning curves, quality against cost. As SVG and PNG, equal bytes every time."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hdm.report.analysis import Analysis, Setting
from hdm.report.numbers import short
from hdm.stats import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]  # setting -> seed -> [(samples, value)]

# Okabe and Ito's colours, which people with any colour vision tell apart, darkened or lightened to be seen on white and on black.
PALETTE = (
    "#0f7fc4",
    "#d9861a",
    "#12a37c",
    "#cc6fa3",
    "#8a7f2a",
    "#d45c1d",
    "#5aa7dd",
    "#8d6bc4",
    "#a8665a",
    "#6f8f3a",
    "#3fa9a0",
    "#b0486d",
)
VERDICT = {Verdict.better: "#12a37c", Verdict.worse: "#d45c1d"}
INK, SOFT, MUTED = "#010203", "#717273", "#a1a2a3"  # stand-ins for the page's own colours: see `inline`
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a setting's label may hold a $
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
MOST_ROWS, MOST_CURVES = 40, 12


@dataclass(kw_only=True, slots=True)
class Drawing:
    """A figure: its name, what it shows in a sentence, the SVG and the PNG (on white)."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """The SVG for a page: text and axes take the page's colours, in the light and in the dark."""
        body = re.sub(r"\s*<metadata>.*?</metadata>", "", self.svg[self.svg.index("<svg") :], flags=re.DOTALL)
        body = body.replace(INK, "currentColor").replace(SOFT, "var(--soft)").replace(MUTED, "var(--line)")
        body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", body)
        body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", body)
        return body.replace("<svg", f'<svg role="img" aria-label="{self.title}"', 1)


def forest(analysis: Analysis) -> Drawing | None:
    """Mean paired differences from the baseline with their intervals, every seed's difference, and the noise band."""
    shown = [s for s in analysis.shown(MOST_ROWS + 1)[1:] if analysis.comparisons[s.label].differences]
    if not shown:
        return None
    rows = [analysis.comparisons[s.label] for s in shown]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        band = max((row.band for row in rows), default=0.0)
        if band:
            axes.axvspan(-band, band, color=MUTED, alpha=0.22, lw=0)
        axes.axvline(0, color=INK, lw=0.8)
        for y, row in enumerate(rows):
            colour = VERDICT.get(row.verdict, SOFT)
            axes.plot(row.differences, [y] * len(row.differences), "o", ms=3.5, mfc="none", mec=SOFT, mew=0.8)
            if row.interval is not None:
                axes.plot([row.interval.low, row.interval.high], [y, y], "-", color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([row.mean], [y], "D", color=colour, ms=5.5)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(*_around(rows, band))
        axes.set_xlabel(f"difference in {analysis.metric} from {analysis.baseline.label}, {_arrow(analysis)}")

    band = "; the grey band is the noise floor" if analysis.noise else ""
    caption = (
        f"Mean difference from {analysis.baseline.label} over common seeds (diamond), its {_percent(analysis)} t interval (bar),"
        f" and the difference of every seed (circles){band}. Green is better, orange is worse, grey is undecided."
        f"{_left_out(analysis, len(rows), 'difference')}"
    )
    return _drawing("differences", "Paired differences", caption, draw, (7.2, 1.0 + 0.34 * len(rows)))


def curves(analysis: Analysis, points: Curves) -> Drawing | None:
    """The metric over samples seen: the mean of each setting, a band of one standard deviation, a thin line for every seed."""
    drawn = {label: seeds for label, seeds in points.items() if any(len(curve) > 1 for curve in seeds.values())}
    if not drawn:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for number, (label, seeds) in enumerate(drawn.items()):
            colour = PALETTE[number % len(PALETTE)]
            for curve in seeds.values():
                axes.plot(*zip(*curve), "-", color=colour, lw=0.6, alpha=0.4)
            steps, mean, spread = _band(list(seeds.values()))
            axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, mean, "-", color=colour, lw=1.8, label=label)
        axes.set_xlabel("samples seen")
        axes.set_ylabel(analysis.metric)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)

    caption = (
        f"{analysis.metric} of every finished seed (thin), the mean over seeds (thick) and one standard deviation around it (band)."
        f"{_left_out(analysis, len(drawn) - 1, 'curve')}"
    )
    return _drawing("curves", "Learning curves", caption, draw, (7.2, 3.6))


def pareto(analysis: Analysis) -> Drawing | None:
    """The metric against each cost that all settings have, with the settings that none beats in both joined up."""
    costs = [(key, name) for key, name in analysis.costs() if key != "cost/dollars"][:4]
    settings = [s for s in analysis.settings if s.finite(analysis.metric)]
    if not costs or len(settings) < 2:
        return None
    colours = {s.label: PALETTE[i % len(PALETTE)] for i, s in enumerate(analysis.shown(MOST_CURVES))}
    columns = (1, 1, 2, 3, 2)[len(costs)]

    def draw(figure: "Figure") -> None:
        for number, (key, name) in enumerate(costs, start=1):
            axes = figure.add_subplot(math.ceil(len(costs) / columns), columns, number)
            _front(axes, analysis, settings, key, colours)
            axes.set_xlabel(f"{name} (s)" if key == "cost/seconds" else name)
            axes.set_ylabel(analysis.metric)
        handles = [axes.plot([], [], "o", color=colour, ms=5, label=label)[0] for label, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))

    caption = (
        f"{analysis.metric} against cost, means over seeds; bars are one standard deviation. The line joins the settings that no"
        " other one beats in both."
        + (f" {len(settings)} settings; named are the baseline and the best." if len(settings) > len(colours) else "")
    )
    rows = math.ceil(len(costs) / columns)
    return _drawing("pareto", "Quality against cost", caption, draw, (7.2, 0.5 + 2.6 * rows + 0.2 * math.ceil(len(colours) / 4)))


def _front(axes: "Axes", analysis: Analysis, settings: Sequence[Setting], cost: str, colours: Mapping[str, str]) -> None:
    front = sorted((s.mean(cost), s.mean(analysis.metric)) for s in analysis.front(cost))
    axes.plot(*zip(*front), "--", color=SOFT, lw=1.0, zorder=1)
    groups = [([s for s in settings if s.label not in colours], SOFT, 3)]  # all those without a name of their own at once
    groups += [([s], colours[s.label], 5) for s in settings if s.label in colours]
    for group, colour, size in groups:
        if group:
            x, y = [s.mean(cost) for s in group], [s.mean(analysis.metric) for s in group]
            spreads = [0.0 if math.isnan(spread := s.spread(analysis.metric)) else spread for s in group]
            axes.errorbar(x, y, yerr=spreads, fmt="o", ms=size, lw=1, color=colour, zorder=2)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.locator_params(axis="x", nbins=3)


def _band(seeds: Sequence[Sequence[tuple[int, float]]]):  # type: ignore[no-untyped-def]
    """(steps that all seeds have, mean, standard deviation) as arrays."""
    import numpy as np

    shared = sorted(set.intersection(*({step for step, _ in curve} for curve in seeds)))
    values = np.array([[dict(curve)[step] for step in shared] for curve in seeds]).reshape(len(seeds), len(shared))
    spread = values.std(axis=0, ddof=1) if len(seeds) > 1 else np.zeros(len(shared))
    return shared, values.mean(axis=0), spread


def _around(rows: Sequence[object], band: float) -> tuple[float, float]:
    """Limits of x that show all means and seeds, and intervals up to three times as wide as those."""
    points = [value for row in rows for value in (*row.differences, row.mean)]  # type: ignore[attr-defined]
    reach = max(max(map(abs, points)), band, 1e-12)
    ends = [e for row in rows if row.interval for e in (row.interval.low, row.interval.high)]  # type: ignore[attr-defined]
    low, high = (
        min([*points, -band, 0.0, *(max(e, -3 * reach) for e in ends)]),
        max([*points, band, 0.0, *(min(e, 3 * reach) for e in ends)]),
    )
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _arrow(analysis: Analysis) -> str:
    return "less is better" if analysis.minimize else "more is better"


def _percent(analysis: Analysis) -> str:
    return f"{100 * (1 - analysis.record.alpha):g} %"


def _left_out(analysis: Analysis, drawn: int, what: str) -> str:
    others = sum(1 for s in analysis.settings if s is not analysis.baseline and s.finite(analysis.metric))
    return (
        f" Of {others} settings the {drawn} with the best means are drawn; the tables hold every {what}." if others > drawn else ""
    )


def _drawing(name: str, title: str, caption: str, draw, size: tuple[float, float]) -> Drawing:  # type: ignore[no-untyped-def]
    """Run `draw` on an empty figure of `size` inches, twice: in the page's colours, and black on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        vector, raster = io.BytesIO(), io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(raster, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Drawing(name=name, title=title, caption=caption, svg=vector.getvalue().decode(), png=raster.getvalue())
