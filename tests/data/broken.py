"""A folder of real and broken pictures: `python tests/data/broken.py FOLDER [COUNT]` makes it, 5 % of it unusable."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def photographs() -> list[Image.Image]:
    """Real pictures: two photographs that scikit-learn carries."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG whose header says 3.6 gigapixels; a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animation(image: Image.Image, kind: str = "GIF") -> bytes:
    return saved(image, kind, save_all=True, append_images=[image.rotate(90 * i) for i in (1, 2)], duration=100)


def deep(image: Image.Image) -> bytes:
    """16 bits of grey."""
    return saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


# what is wrong -> the reason that is given, the file's extension, its bytes and those of its caption (None: no file)
BROKEN: dict[str, tuple[str, str, Callable[[Image.Image], bytes], bytes | None]] = {
    "truncated": ("truncated or damaged", ".jpg", lambda i: saved(i, "JPEG")[:3000], b"x"),
    "damaged": ("truncated or damaged", ".png", lambda i: saved(i, "PNG")[:-300] + bytes(300), b"x"),
    "empty": ("empty file", ".jpg", lambda i: b"", b"x"),
    "html": ("not a picture", ".jpg", lambda i: b"<!DOCTYPE html><title>404 Not Found</title>", b"x"),
    "bomb": ("too many pixels", ".png", lambda i: bomb(), b"x"),
    "animated": ("animated", ".gif", animation, b"x"),
    "moving": ("animated", ".webp", lambda i: animation(i, "WEBP"), b"x"),
    "tiny": ("too small", ".png", lambda i: saved(i.resize((20, 90)), "PNG"), b"x"),
    "silent": ("no caption (.txt)", ".jpg", lambda i: saved(i, "JPEG"), None),
    "latin": ("caption is not UTF-8", ".jpg", lambda i: saved(i, "JPEG"), b"caf\xe9"),
    "wordless": ("empty caption", ".jpg", lambda i: saved(i, "JPEG"), b" \n"),
    "bars": ("caption with several |||", ".jpg", lambda i: saved(i, "JPEG"), b"a ||| b ||| c"),
}
# odd but usable -> the note, extension and bytes
ODD: dict[str, tuple[str, str, Callable[[Image.Image], bytes]]] = {
    "misnamed": ("wrong extension", ".png", lambda i: saved(i, "JPEG")),
    "print": ("CMYK", ".jpg", lambda i: saved(i.convert("CMYK"), "JPEG")),
    "deep": ("16 bits a channel", ".png", deep),
    "bitmap": ("BMP stored as PNG", ".bmp", lambda i: saved(i, "BMP")),
}


def make(folder: Path, count: int = 240) -> None:
    """`count` pictures in two sub-folders; each of BROKEN and ODD is among them once per 240."""
    photos = photographs()
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = 7 * i % 300, 5 * i % 200
        image = photo.crop((left, top, left + 160 + i % 90, top + 120 + i % 70))
        kinds, odd = list(BROKEN), list(ODD)
        name, ending, data, text = f"{i:05d}", ".jpg", None, f"a detail, number {i} ||| photograph $$ crop {i} %% real".encode()
        if i % 20 == 7:
            what = kinds[i // 20 % len(kinds)]
            _, ending, write, text = BROKEN[what]
            name, data = f"{name}-{what}", write(image)
        elif i % 60 == 13:
            what = odd[i // 60 % len(odd)]
            _, ending, write = ODD[what]
            name, data = f"{name}-{what}", write(image)
        place = folder / f"{i % 2}_things" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(ending).write_bytes(saved(image, "JPEG", quality=90) if data is None else data)
        if text is not None:
            place.with_suffix(".txt").write_bytes(text)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
