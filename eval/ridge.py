"""A linear map from image features to sentence embeddings, fitted by ridge regression on the training split and cached."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eval.extractor import Extractor
from eval.features import features
from eval.samples import open_split, read_images
from hdm.config.axes import TEXT_ENCODER
from hdm.config.compose import flatten
from hdm.config.schema import Dtype, RunConfig
from hdm.files import locked, replacing, sha256

SAMPLES = 4096
PENALTIES = tuple(10.0 ** (n / 2) for n in range(-2, 13))  # 0.1 … 1e6
_BATCH = 64

Matrix = NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class RidgeMap:
    """y = (x - image_mean) @ weight, where y is an embedding minus `text_mean`. `source` says what it was fitted on."""

    weight: Matrix
    image_mean: Matrix
    text_mean: Matrix
    penalty: float
    source: str

    def predict(self, x: Matrix) -> Matrix:
        """Centred embeddings (N, D) of image features (N, F)."""
        return (x - self.image_mean) @ self.weight


def fit(x: Matrix, y: Matrix, *, source: str, penalties: Sequence[float] = PENALTIES) -> RidgeMap:
    """Ridge regression of y (N, D) on x (N, F), the penalty p chosen by the leave-one-out error, which has a closed form.

    With the centred X = U s V', the fit is H Y with H = U s^2 / (s^2 + p) U', and sample i, left out, is missed by the residual of
    the whole fit divided by 1 - H_ii (Hastie, Tibshirani and Friedman, eq. 7.64).
    """
    image_mean, text_mean = x.mean(axis=0), y.mean(axis=0)
    a, b = x - image_mean, y - text_mean
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    projected = u.T @ b

    def left_out_error(penalty: float) -> float:
        shrinkage = s**2 / (s**2 + penalty)
        residual = b - u @ (shrinkage[:, None] * projected)
        return float(np.mean((residual / (1 - u**2 @ shrinkage)[:, None]) ** 2))

    best = min(penalties, key=left_out_error)
    weight = vt.T @ ((s / (s**2 + best))[:, None] * projected)
    return RidgeMap(weight=weight, image_mean=image_mean, text_mean=text_mean, penalty=best, source=source)


class SentenceEncoder:
    """MiniLM's sentence embedding: the mean of its token states, scaled to length one. A package carries the weights."""

    def __init__(self, cache: Path, device: torch.device) -> None:
        from hdm.conditioning.text_encoder import MiniLMConfig

        self.encoder = TEXT_ENCODER.build(MiniLMConfig(dtype=Dtype.fp32), cache=cache, device=device)
        self.digest = sha256(Path(self.encoder.path) / "model.safetensors")

    def encode(self, captions: Sequence[str]) -> Matrix:
        """Unit vectors (N, 384)."""
        rows = []
        for start in range(0, len(captions), _BATCH):
            states, mask = self.encoder.encode(captions[start : start + _BATCH])
            mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            rows.append(torch.nn.functional.normalize(mean, dim=-1).double().cpu())
        return torch.cat(rows).numpy()


def fitted(run: RunConfig, extractor: Extractor, sentences: SentenceEncoder, device: torch.device) -> RidgeMap:
    """The map for the run's data set and crop, fitted by the first process that needs it; the others wait for it."""
    shards = open_split(run, "train")
    crop = {key: value for key, value in flatten(run).items() if key.partition(".")[0] == "crop"}
    source = {
        "data": shards.name,
        "digest": shards.digest,
        "samples": min(SAMPLES, len(shards)),
        **crop,
        "features": extractor.facts(),
        "sentences": sentences.digest,
    }
    key = hashlib.blake2b(json.dumps(source, sort_keys=True).encode(), digest_size=8).hexdigest()
    path = Path(run.cache) / "alignment" / f"ridge_minilm-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        known = _load(path)
        if known is None:
            train = read_images(run, shards, SAMPLES)
            x = features(train.pixels, extractor, cache=Path(run.cache), device=device, title="training images")
            known = fit(x, sentences.encode(train.captions), source=key)
            _save(known, path)
    return known


def _save(ridge: RidgeMap, path: Path) -> None:
    arrays = {"weight": ridge.weight, "image_mean": ridge.image_mean, "text_mean": ridge.text_mean}
    with replacing(path) as partial:
        save_file(arrays, partial, metadata={"penalty": repr(ridge.penalty), "source": ridge.source})


def _load(path: Path) -> RidgeMap | None:
    """The map in `path`; None where there is none or a damaged one."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (OSError, SafetensorError):
        return None
    return RidgeMap(**arrays, penalty=float(metadata["penalty"]), source=metadata["source"])
