"""A run of seconds: a network of a few thousand parameters, the hash text encoder, the pixel autoencoder, shards of noise."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TINY = [
    "experiment=none", "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1",
    "model.dec_blocks=1", "model.patch=4", "text_encoder=hash", "autoencoder=pixel", "data=webdataset", "data.path=shards",
    "crop.size=16", "train.batch_size=4", "train.workers=0", "train.precision=fp32", "train.log_every=4", "train.validate_every=8",
    "train.sample_every=8", "train.checkpoint_every=8", "validation.samples=4", "validation.timesteps=2", "sampling.grid=2",
    "sampler.steps=2", "hardware.peak_tflops=0.1", "budget.samples=16", "eval.metrics=[]",
]  # fmt: skip


def write_shards(folder: Path) -> Path:
    """Sixteen pictures of noise in `folder`/shards."""
    folder = folder / "shards"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, count in (("train-000", 12), ("val-000", 4)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(count):
                image = io.BytesIO()
                Image.fromarray(noise.integers(0, 255, (20, 18 + i % 5, 3), dtype=np.uint8)).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("txt", f"picture {i}, noise".encode())):
                    info = tarfile.TarInfo(f"{name}-{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder
