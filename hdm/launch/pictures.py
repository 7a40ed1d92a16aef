"""The sweep's pictures as a table of MLflow, with the sweep's own run: rows are captions, columns settings, all of one noise."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hdm.files import write_json
from hdm.launch.arm import Arm
from hdm.report.gallery import CAPTIONS, Grid, cut
from hdm.report.record import ArmRecord

if TYPE_CHECKING:
    from hdm.launch.ranking import Ranking

FILE = "pictures.json"
_FOLDER = "pictures"
_MOST_SETTINGS, _MOST_CAPTIONS = 8, 16
_SMALLEST, _LARGEST = 128, 512  # pixels of a picture's longer side


def write(ranking: "Ranking", folder: Path) -> list[Path]:
    """pictures.json and its pictures in `folder`: the baseline and the best settings, of the first seed that most of them have.

    The file is what `mlflow.log_table` makes of a column of `mlflow.Image`, written here since that appends to what an earlier
    launcher left. [] where no arm drew anything.
    """
    settings = list(dict.fromkeys([ranking.baseline, *ranking.settings]))[:_MOST_SETTINGS]
    arms = [row.arm for row in ranking.rows if row.arm.setting in settings and row.status == "finished"]
    seeds = [arm.run.seed for arm in arms]
    if not seeds:
        return []
    seed = max(sorted(set(seeds)), key=seeds.count)
    grids = {arm.setting: grid for arm in arms if arm.run.seed == seed and (grid := _grid(arm))}
    if not grids:
        return []
    captions = _captions(next(arm for arm in arms if arm.setting in grids and arm.run.seed == seed))
    count = min(_MOST_CAPTIONS, len(captions), *(len(grid.tiles) for grid in grids.values()))
    columns = [name for name in settings if name in grids]
    (folder / _FOLDER).mkdir(exist_ok=True)
    paths, rows = [], []
    for number in range(count):
        cells: list[object] = [captions[number]]
        for column, name in enumerate(columns):
            path = folder / _FOLDER / f"{number:02d}-{column}.png"
            _save(grids[name], number, path)
            place = path.relative_to(folder).as_posix()
            cells.append({"type": "image", "filepath": place, "compressed_filepath": place})
            paths.append(path)
        rows.append(cells)
    write_json(folder / FILE, {"columns": ["prompt", *columns], "data": rows})
    return [*paths, folder / FILE]


def _grid(arm: Arm) -> Grid | None:
    pictures = sorted((arm.folder / "samples").glob("samples-*.png"))
    if not pictures:
        return None
    params = {"crop.size": str(getattr(arm.run.crop, "size", "")), "sampling.grid": str(arm.run.sampling.grid)}
    record = ArmRecord(run=arm.folder.name, point=arm.point, setting=arm.setting, seed=arm.run.seed, params=params)
    return cut(pictures[-1].read_bytes(), record)


def _captions(arm: Arm) -> list[str]:
    try:
        return [str(caption) for caption in json.loads((arm.folder / CAPTIONS).read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError):
        return [f"prompt {number + 1}" for number in range(arm.run.sampling.grid)]


def _save(grid: Grid, number: int, path: Path) -> None:
    """A small picture enlarged by a whole factor, without smoothing; a large one reduced."""
    from PIL import Image

    image = grid.tiles[number]
    scale = -(-_SMALLEST // max(image.size))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    elif max(image.size) > _LARGEST:
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST))
    image.save(path)
