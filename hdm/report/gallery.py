"""Pictures of the arms side by side: the tiles of their sample grids, which all show the same captions from the same noise."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hdm.report.analysis import Analysis
from hdm.report.record import ArmRecord

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = "samples/captions.json"  # artifact of a run: the captions of its grid, in order
MOST_SETTINGS, MOST_TILES = 8, 1200
_LARGEST = 160  # pixels of a tile's longer side on the page
_EXACT = 64  # pixels up to which a tile is kept to the bit


@dataclass(kw_only=True, slots=True)
class Grid:
    """The pictures of one arm: a tile per caption, and below each the strip of the grid in which its caption is written."""

    arm: ArmRecord
    tiles: "list[Image.Image]"
    strips: "list[Image.Image]"


@dataclass(kw_only=True, slots=True)
class Gallery:
    """One seed's pictures: rows are captions, columns are arms. Without `captions` the strips of the first arm stand for them."""

    seed: int
    grids: list[Grid]
    captions: list[str]

    def html(self) -> str:
        """A table of pictures."""
        heads = "".join(f"<th>{html.escape(grid.arm.setting)}</th>" for grid in self.grids)
        rows = []
        for number in range(max(len(grid.tiles) for grid in self.grids)):
            cells = "".join(f"<td>{self._tile(grid, number)}</td>" for grid in self.grids)
            rows.append(f"<tr><th class=prompt>{self._prompt(number)}</th>{cells}</tr>")
        head = f"<thead><tr><th>prompt</th>{heads}</tr></thead>"
        return f"<div class=scroll><table class=gallery>{head}<tbody>{''.join(rows)}</tbody></table></div>"

    def _prompt(self, number: int) -> str:
        if number < len(self.captions):
            return html.escape(self.captions[number])
        return _image(self.grids[0].strips[number], f"prompt {number + 1}") if number < len(self.grids[0].strips) else ""

    def _tile(self, grid: Grid, number: int) -> str:
        if number >= len(grid.tiles):
            return ""
        caption = self.captions[number] if number < len(self.captions) else f"prompt {number + 1}"
        return _image(grid.tiles[number], f"{caption}, {grid.arm.label}")


def cut(picture: bytes, arm: ArmRecord) -> Grid | None:
    """The tiles of a logged grid, as `hdm.pictures.sheet` laid it out; None where the layout does not fit the arm's parameters."""
    from PIL import Image

    from hdm.pictures import cells

    try:
        side, count = int(arm.params["crop.size"]), int(arm.params["sampling.grid"])
    except (KeyError, ValueError):
        return None
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
    found = cells(image, most=count, size=(side, side))
    if not found:
        return None
    tiles = [image.crop(tile).resize((side, side), Image.Resampling.NEAREST) for tile, _ in found]
    blank = [tile.getextrema() == ((255, 255), (255, 255), (255, 255)) for tile in tiles]
    last = max((number for number, white in enumerate(blank) if not white), default=-1)  # a small data set has fewer captions
    return Grid(arm=arm, tiles=tiles[: last + 1], strips=[image.crop(strip) for _, strip in found[: last + 1]])


def galleries(analysis: Analysis, grids: Mapping[str, Grid], captions: Sequence[str]) -> list[Gallery]:
    """One per seed, the smallest first, as many as the page has room for; `grids` are by run id."""
    settings = analysis.shown(MOST_SETTINGS)
    found: list[Gallery] = []
    tiles = 0
    for seed in analysis.seeds:
        own = [grids[arm.run_id] for s in settings for arm in s.arms if arm.seed == seed and arm.run_id in grids]
        tiles += sum(len(grid.tiles) for grid in own)
        if not own or (found and tiles > MOST_TILES):
            continue
        found.append(Gallery(seed=seed, grids=own, captions=list(captions)))
    return found


def _image(image: "Image.Image", text: str) -> str:
    """An <img> that carries its picture."""
    exact = max(image.size) <= _EXACT or image.height < 60
    file = io.BytesIO()
    if exact:
        image.save(file, "PNG", optimize=True)
    else:
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST))
        image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if exact else "jpeg"
    scale = max(1, 96 // max(image.size)) if exact else 1
    size = f"width={image.width * scale} height={image.height * scale}"
    return f'<img alt="{html.escape(text)}" {size} src="data:image/{kind};base64,{data}">'
