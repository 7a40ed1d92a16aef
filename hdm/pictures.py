"""Pictures of pictures: images in labelled rows."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_WIDEST = 1600  # pixels of a whole sheet
_SMALLEST = 96  # pixels of a tile; smaller images are shown enlarged by a whole factor, without smoothing


def sheet(
    images: UInt8[Tensor, "N 3 H W"] | Sequence[UInt8[Tensor, "3 H W"]], labels: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """The images, of one size or of several, on white, row by row, each with its label below."""
    count, height, width = len(images), max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    scale = max(1, -(-_SMALLEST // min(height, width)))
    cell_width, cell_height = width * scale + 8, height * scale + 8
    columns = columns or min(count, max(1, _WIDEST // cell_width), round(count**0.5 + 0.5))
    font = ImageFont.load_default(size=11)
    wrapped = [textwrap.wrap(label, width=max(8, cell_width // 6))[:3] for label in labels]
    text_height = 14 * max((len(lines) for lines in wrapped), default=0) + 4
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * cell_width, rows * (cell_height + text_height)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        x, y = (i % columns) * cell_width + 4, (i // columns) * (cell_height + text_height) + 4
        tile = to_image(image)
        canvas.paste(tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height * scale + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return canvas


def to_image(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """One image."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
