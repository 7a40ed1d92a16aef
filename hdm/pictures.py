"""Pictures of pictures: images in labelled rows."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_WIDEST = 1600  # pixels of a whole sheet
_SMALLEST = 96  # pixels of a tile; smaller images are shown enlarged by a whole factor, without smoothing
_LINE, _LINES = 14, 3  # pixels of a line of a label, and how many there are at most


def sheet(
    images: UInt8[Tensor, "N 3 H W"] | Sequence[UInt8[Tensor, "3 H W"]], labels: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """The images, of one size or of several, on white, row by row, each with its label below."""
    count, height, width = len(images), max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    scale = max(1, -(-_SMALLEST // min(height, width)))
    cell_width, cell_height = width * scale + 8, height * scale + 8
    columns = columns or _columns(count, cell_width)
    font = ImageFont.load_default(size=11)
    wrapped = [textwrap.wrap(label, width=max(8, cell_width // 6))[:_LINES] for label in labels]
    text_height = _LINE * max((len(lines) for lines in wrapped), default=0) + 4
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * cell_width, rows * (cell_height + text_height)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        x, y = (i % columns) * cell_width + 4, (i // columns) * (cell_height + text_height) + 4
        tile = to_image(image)
        canvas.paste(tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height * scale + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return canvas


Box = tuple[int, int, int, int]  # left, top, right, bottom


def cells(image: Image.Image, *, most: int, size: tuple[int, int]) -> list[tuple[Box, Box]]:
    """Where the parts of a `sheet` of at most `most` images of `size` (H, W) lie: (box of the image, box of its label) of each.

    The last ones may be empty, where fewer images than that fill as many rows. [] for a picture that cannot be such a sheet.
    """
    scale = max(1, -(-_SMALLEST // min(size)))
    height, width = size[0] * scale, size[1] * scale
    columns, rest = divmod(image.width, width + 8)
    for count in range(most, 0, -1):
        rows = -(-count // columns) if columns else 0
        if rest or not rows or columns != _columns(count, width + 8) or image.height % rows:
            continue
        row = image.height // rows
        lines, rest_of_text = divmod(row - height - 8 - 4, _LINE)
        if rest_of_text or not 0 <= lines <= _LINES:
            continue
        corners = [((i % columns) * (width + 8) + 4, (i // columns) * row + 4) for i in range(count)]
        return [((x, y, x + width, y + height), (x, y + height, x + width, y - 4 + row)) for x, y in corners]
    return []


def _columns(count: int, cell_width: int) -> int:
    return min(count, max(1, _WIDEST // cell_width), round(math.sqrt(count) + 0.5))


def to_image(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """One image."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
