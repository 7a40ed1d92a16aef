"""A real run in miniature: shards of coloured squares on disk, a network of a few thousand parameters."""

import io
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (235, 220, 40)}

NANO = [
    "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1", "model.dec_blocks=1",
    "model.patch=4", "text_encoder=hash", "text_encoder.width=12", "autoencoder=pixel", "data=webdataset", "data.path=shards",
    "data.val=val.tar", "crop.size=16", "train.batch_size=4", "train.workers=0", "train.precision=fp32", "train.log_every=8",
    "train.validate_every=1000000", "train.sample_every=1000000", "train.checkpoint_every=1000000", "schedule.warmup=2",
    "validation.samples=4", "validation.timesteps=4", "sampling.grid=0", "hardware.peak_tflops=0.1", "budget.steps=4",
]  # fmt: skip


def write_tar(path: Path, count: int, *, broken: tuple[int, ...] = ()) -> None:
    """A shard of `count` squares on noise, each with its caption; `broken` ones are no images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.Philox(count))
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            name = list(COLOURS)[i % len(COLOURS)]
            pixels = draw.integers(0, 40, (18, 20 + i % 3, 3), dtype=np.uint8)
            pixels[5:13, 5:14] = COLOURS[name]
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            data = b"no image" if i in broken else image.getvalue()
            for suffix, content in ((".png", data), (".txt", f"{name} square, small".encode())):
                info = tarfile.TarInfo(f"{i:04d}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class Listener:
    """A recorder that keeps everything in memory."""

    def __init__(self):
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.images: list[tuple[str, Path, int]] = []
        self.datasets: dict[str, str] = {}
        self.rewound: list[int] = []

    def params(self, values): ...
    def tags(self, values): ...
    def artifact(self, path): ...

    def metrics(self, values, samples):
        self.rows.append((samples, dict(values)))

    def rewind(self, samples):
        self.rewound.append(samples)

    def image(self, key, path, samples):
        self.images.append((key, path, samples))

    def dataset(self, name, digest, context):
        self.datasets[context] = digest

    def series(self, key) -> dict[int, float]:
        return {samples: row[key] for samples, row in self.rows if key in row}


class Killer(Listener):
    """Kills the process, without a chance to save, when `samples` are logged; checkpoint `saved` is on the disk by then."""

    def __init__(self, samples: int, saved: int):
        super().__init__()
        self.samples, self.saved = samples, Path(f"run/checkpoints/samples-{saved:09d}")

    def metrics(self, values, samples):
        if samples == self.samples and "train/loss" in values:
            deadline = time.monotonic() + 60  # the background writes it
            while not self.saved.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
