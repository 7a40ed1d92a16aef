"""What it costs to make training samples: reading, decoding, cropping, captions; from disk, over HTTP, through a cache.

usage: python benchmarks/data.py [images=256] [size=256] [rounds=5] [delay_ms=0]

Real photographs (scikit-learn's two, cut to about 1 megapixel each, JPEG) are packed into shards and read by one process in batches
of 32. Every round times one pass of each arm in turn (A B C A B C …); the table gives the median rate and the median over rounds of
(arm / first arm of the same round). The HTTP server is a process of its own on this machine and answers ranges; `delay_ms` makes
each answer wait, as a distant one does.
"""

import http.server
import io
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hdm import cli
from hdm.config.axes import DATA, discover
from hdm.config.schema import CaptionConfig
from hdm.data.captions import draw_caption
from hdm.data.crop import ShiftedSquare, ShiftedSquareConfig
from hdm.data.images import decode
from hdm.data.shards import Shards
from hdm.rng import generator

BATCH = 32
TEXT = "masterpiece $$ newest $$ a photograph ||| red $$ green $$ blue %% indoors $$ daylight %% A sentence about it."


def pack(folder: Path, images: int) -> None:
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image).resize((1280, 854), Image.Resampling.BICUBIC) for image in load_sample_images().images]
    for name, numbers in (("train-000", range(images // 2)), ("train-001", range(images // 2, images)), ("val-000", range(1))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in numbers:
                data, left = io.BytesIO(), 3 * i % 200
                photos[i % 2].crop((left, 0, left + 1080, 854)).save(data, "JPEG", quality=90)
                for ending, content in (("jpg", data.getvalue()), ("txt", TEXT.encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


class Ranges(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    delay = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = self.translate_path(self.path), self.headers.get("Range")
        if os.path.isdir(path) or not os.path.exists(path) or not wanted:
            super().do_GET()
            return
        time.sleep(self.delay)
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with open(path, "rb") as file:
            file.seek(first)
            part = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{os.path.getsize(path)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


def serve(folder: str, delay: float, port: Any) -> None:
    Ranges.delay = delay
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Ranges(*a, directory=folder))
    port.send(server.server_port)
    server.serve_forever()


def shards(path: str, datasets: Path, **fields: object) -> Shards:
    opened: Shards = DATA.build(DATA.get("webdataset").config(path=path, **fields)).open(datasets, "train")
    return opened


def passes(found: dict[str, Shards], images: int, size: int) -> dict[str, Callable[[], None]]:
    """One pass over all samples, in random order, by arm."""
    crop, captions = ShiftedSquare(ShiftedSquareConfig(size=size)), CaptionConfig()
    order = generator(0, "benchmark").permutation(images)

    def samples(data: Shards, *, work: bool = True, ahead: bool = True) -> None:
        for first in range(0, images, BATCH):
            batch = [int(i) for i in order[first : first + BATCH]]
            if ahead:
                data.fetch(batch)
            for i in batch:
                record = data.read(i)
                if work:
                    crop(decode(record.image, size), generator(0, "crop", i))
                    draw_caption(record.caption, captions, generator(0, "caption", i))

    def full() -> None:
        for i in map(int, order):
            image = Image.open(io.BytesIO(found["local"].read(i).image)).convert("RGB")
            short = size / min(image.size)
            whole = image.resize((round(image.width * short), round(image.height * short)), Image.Resampling.BICUBIC)
            np.asarray(whole.crop((0, 0, size, size)))

    return {
        "disk": lambda: samples(found["local"]),
        "disk, decoded and resized whole": full,
        "disk, read only": lambda: samples(found["local"], work=False),
        "http": lambda: samples(found["http"]),
        "http, one request after the other": lambda: samples(found["http"], ahead=False),
        "http, read only": lambda: samples(found["http"], work=False),
        "http, copied shards": lambda: samples(found["copies"]),
    }


def command(arguments: list[str]) -> None:
    """Measure and print a Markdown table."""
    images, size = int(cli.take_option(arguments, "images") or 256), int(cli.take_option(arguments, "size") or 256)
    rounds, delay = int(cli.take_option(arguments, "rounds") or 5), float(cli.take_option(arguments, "delay_ms") or 0)
    cli.reject_unknown(arguments, "usage: python benchmarks/data.py [images=256] [size=256] [rounds=5] [delay_ms=0]")
    discover()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        folder.mkdir()
        pack(folder, images)
        here, there = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.Process(target=serve, args=(str(folder), delay / 1000, there), daemon=True)
        server.start()
        address = f"http://127.0.0.1:{here.recv()}"
        found = {
            "local": shards(str(folder), Path(temporary) / "a"),
            "http": shards(address, Path(temporary) / "b"),
            "copies": shards(address, Path(temporary) / "c", cache_gb=10.0),
        }
        arms = passes(found, images, size)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(rounds + 1):
            for name, run in arms.items():
                began = time.perf_counter()
                run()
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
        server.terminate()
    megabytes = found["local"].total_bytes / images / 1e6
    print(f"{images} JPEG of 1080 x 854 ({megabytes:.2f} MB) to {size} px, {platform.machine()} CPU, one process, {rounds} rounds,")
    print(f"HTTP answers delayed by {delay:g} ms\n\n| arm | samples/s | rate / first arm |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(b / t for t, b in zip(times, seconds["disk"]))
        print(f"| {name} | {images / statistics.median(times):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    cli.main(command, __doc__ or "")
