"""Whether a picture and its caption can be used, and why not: one short reason each, and what was found.

What can be used as it is goes into shards untouched, byte for byte, under the extension of what it is; formats that shards do not
hold are stored as PNG. What is odd but usable (a wrong extension, CMYK, 16 bits a channel) is noted.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from PIL import Image, UnidentifiedImageError

from hdm.config.errors import DataError
from hdm.data.captions import KEEP, full_caption
from hdm.data.images import decode

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
_STORED = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # format -> extension in shards
_SAME = {"jpeg": "jpg", "tiff": "tif"}
_MOST_PIXELS = 2 * 89_478_485  # what Pillow refuses to open, as more looks like an attack


class UnusableError(DataError):
    """A picture or caption that cannot be used; `reason` is one of a few, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as it goes into a shard, and what is odd about it."""

    data: bytes
    extension: str
    notes: tuple[str, ...] = ()


def picture(data: bytes, name: str, *, min_side: int, max_pixels: float) -> Picture:
    """Examine and fully decode the file `name`. Raises UnusableError."""
    if not data:
        raise UnusableError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, notes = _header(data, min_side=min_side, max_pixels=min(max_pixels, _MOST_PIXELS))
    try:
        box = (1, 1) if kind in _STORED else None
        decoded = decode(data, box or _size(data))
    except DataError as error:
        raise UnusableError("truncated or damaged", str(error).removeprefix("image cannot be decoded: ")) from None
    extension = _STORED.get(kind, kind.lower())
    named = PurePath(name).suffix.lower().lstrip(".")
    if named and _SAME.get(named, named) != _SAME.get(extension, extension):
        notes.append("wrong extension")
    if box is not None:
        return Picture(data, extension, tuple(notes))
    stored = io.BytesIO()
    decoded.image.save(stored, "PNG")
    return Picture(stored.getvalue(), "png", (*notes, f"{kind} stored as PNG"))


def _header(data: bytes, *, min_side: int, max_pixels: float) -> tuple[str, list[str]]:
    """The format and what is odd, as the header says. Raises UnusableError."""
    try:
        image: Any = Image.open(io.BytesIO(data))
        width, height = image.size
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        depth = str(getattr(image, "tile", ""))
    except UnidentifiedImageError:
        raise UnusableError("not a picture", f"{len(data)} bytes that begin with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        raise UnusableError("too many pixels", "more than Pillow opens") from None
    except Exception as error:  # decoders raise whatever they like on damaged input
        raise UnusableError("truncated or damaged", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    if width * height > max_pixels:
        raise UnusableError("too many pixels", f"{width} x {height}")
    if min(width, height) < min_side:
        raise UnusableError("too small", f"{width} x {height}")
    if frames > 1:
        raise UnusableError("animated", f"{frames} frames")
    notes = []
    if image.mode == "CMYK":
        notes.append("CMYK")
    if image.mode.startswith("I") or ";16" in depth:
        notes.append("16 bits a channel")
    return image.format or "", notes


def _size(data: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(data))
    return image.height, image.width


def caption(data: bytes | str) -> str:
    """The text of a caption record. Raises UnusableError when it is no UTF-8, empty, or has more than one `|||`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError("caption is not UTF-8", f"byte {error.start}") from None
    try:
        whole = full_caption(text)
    except DataError as error:
        raise UnusableError(f"caption with several {KEEP}", str(error).partition(": ")[2]) from None
    if not whole:
        raise UnusableError("empty caption")
    return " ".join(text.split())
