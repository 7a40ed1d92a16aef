"""From a server to a folder: read what the page shows, draw, write."""

from collections.abc import Callable
from pathlib import Path

from hdm.config.errors import HdmError
from hdm.files import replacing
from hdm.report import figures, gallery
from hdm.report.analysis import Analysis, analyse
from hdm.report.page import Report
from hdm.report.record import SweepRecord
from hdm.report.sections import tables
from hdm.report.store import Store

Advance = Callable[[float], None]


def collect(
    store: Store,
    name: str,
    *,
    baseline: str | None = None,
    metric: str | None = None,
    direction: str | None = None,
    noise_floor: str | None = None,
    advance: Advance = lambda _: None,
) -> Report:
    """Everything that the page of sweep `name` shows. `advance` is told the fraction that each part of the reading was."""
    record = store.sweep(name)
    noise, missing = _noise(store, name, noise_floor, record.noise_floor)
    analysis = analyse(record, store.json, baseline=baseline, metric=metric, direction=direction, noise=noise)
    analysis.notes.extend(missing)
    advance(0.2)
    curves = _curves(store, analysis, advance)
    grids, captions = _grids(store, analysis, advance)
    source = record.run_id or next((arm.run_id for arm in record.arms if arm.run_id), "")
    environment = (store.json(source, "environment.json") or {}) if source else {}
    drawings = [figures.forest(analysis), figures.curves(analysis, curves), figures.pareto(analysis)]
    return Report(
        analysis=analysis,
        drawings=[drawing for drawing in drawings if drawing is not None],
        galleries=gallery.galleries(analysis, grids, captions),
        environment=environment,
    )


def _noise(store: Store, name: str, asked: str | None, own: str | None) -> tuple[SweepRecord | None, list[str]]:
    """The A/A sweep, or why there is none: what the sweep itself names may not have been run yet, what is `asked` for must."""
    if asked or not own or own == name:
        return (store.sweep(asked) if asked and asked != name else None), []
    try:
        return store.sweep(own), []
    except HdmError as error:
        return None, [f"the sweep names a noise floor, and there is none: {error}; run it, then this again"]


def write(report: Report, folder: Path) -> list[Path]:
    """index.html, report.md, tables.tex, table-NAME.md and the figures; return the paths, the page first."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    contents = {
        "index.html": report.html(),
        "report.md": report.markdown(),
        "tables.tex": report.latex(),
        **{f"table-{table.name}.md": table.markdown() for table in tables(report.analysis)},
        **{f"figures/{drawing.name}.svg": drawing.svg for drawing in report.drawings},
    }
    for path, text in contents.items():
        with replacing(folder / path) as partial:
            partial.write_text(text, encoding="utf-8")
    for drawing in report.drawings:
        with replacing(folder / "figures" / f"{drawing.name}.png") as partial:
            partial.write_bytes(drawing.png)
    return [folder / path for path in (*contents, *(f"figures/{drawing.name}.png" for drawing in report.drawings))]


def _curves(store: Store, analysis: Analysis, advance: Advance) -> figures.Curves:
    """The metric's curve of every finished arm of the settings that are drawn."""
    settings = analysis.shown(figures.MOST_CURVES)
    arms = [arm for setting in settings for arm in setting.arms if arm.finished and analysis.metric in arm.metrics]
    found: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for arm in arms:
        found.setdefault(arm.setting, {})[arm.seed] = store.curve(arm.run_id, analysis.metric)
        advance(0.4 / len(arms))
    return found


def _grids(store: Store, analysis: Analysis, advance: Advance) -> tuple[dict[str, gallery.Grid], list[str]]:
    """The sample grids of the settings that are shown, by run id, and their captions where they were recorded."""
    seeds = analysis.seeds
    arms = [arm for setting in analysis.shown(gallery.MOST_SETTINGS) for arm in setting.arms if arm.finished]
    arms.sort(key=lambda arm: seeds.index(arm.seed))
    grids: dict[str, gallery.Grid] = {}
    captions: list[str] = []
    tiles = 0
    for arm in arms:
        advance(0.4 / len(arms))
        if tiles > gallery.MOST_TILES:
            continue
        picture = store.picture(arm.run_id)
        grid = gallery.cut(picture, arm) if picture else None
        if grid is None:
            continue
        grids[arm.run_id] = grid
        tiles += len(grid.tiles)
        captions = captions or store.json(arm.run_id, gallery.CAPTIONS) or []
    return grids, captions
