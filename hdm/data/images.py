"""From encoded bytes to an RGB image, no larger than the crop needs."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hdm.config.errors import DataError

_ORIENTATION = 0x0112  # EXIF tag: how a camera held the picture
_SCALABLE = {"JPEG", "MPO"}  # formats that can be decoded at reduced scale


@dataclass(frozen=True, slots=True)
class Decoded:
    """An RGB image, and the (width, height) that it has when decoded at full scale."""

    image: Image.Image
    width: int
    height: int


def decode(data: bytes, box: int | tuple[int, int]) -> Decoded:
    """Decode an image that will be resized to cover `box`: (height, width), or the side of a square.

    A JPEG is decoded at 1/2, 1/4 or 1/8 scale where that still covers the box. Transparency is laid on white, a camera's
    orientation applied. Raises DataError with the reason for whatever cannot be decoded.
    """
    if not data:
        raise DataError("empty image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata; a picture too large to be safe raises all the same
            image: Image.Image = Image.open(io.BytesIO(data))
            width, height = image.size
            rows, columns = (box, box) if isinstance(box, int) else box
            if image.format in _SCALABLE:
                stored = (columns, rows) if _turned(image) else (rows, columns)
                image.draft("RGB", covering(width, height, stored))
            image.load()
            if _turned(image):
                width, height = height, width
            ImageOps.exif_transpose(image, in_place=True)
            return Decoded(image=_on_white(image), width=width, height=height)
    except UnidentifiedImageError:
        raise DataError(f"image cannot be decoded: {len(data)} bytes of no known image format") from None
    except Exception as error:  # decoders raise whatever they like on damaged input
        raise DataError(f"image cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None


def measured(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an image as `decode` finds them, from its header alone; None where there is none.

    A PNG that keeps its orientation behind the pixels is measured as it is stored: finding out would mean decoding it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            turned = (image.format != "PNG" or "exif" in image.info) and _turned(image)
            return (image.height, image.width) if turned else image.size
    except Exception:  # decoders raise whatever they like on damaged input
        return None


def _turned(image: Image.Image) -> bool:
    """Whether the camera was held upright: orientations 5 to 8 turn the picture by a quarter."""
    return bool(image.getexif().get(_ORIENTATION, 1) >= 5)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) after resizing the short side to `size`."""
    return covering(width, height, (size, size))


def covering(width: int, height: int, box: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the smallest resized image that covers `box`, (height, width): one side fits, the other may be longer."""
    rows, columns = box
    if width * rows <= height * columns:
        return columns, max(round(height * columns / width), rows)
    return max(round(width * rows / height), columns), rows
