"""Text-image alignment: how well each generated image fits its caption, and whether it fits better than the other captions do.

An aligner maps images and captions to unit vectors of one space. `clip` is CLIP. `ridge_minilm` serves where no CLIP weights are:
a linear map, fitted on the training split, from image features to MiniLM's sentence embeddings. It ranks captions of the data set
that it was fitted on; its numbers are no CLIP scores, and say so by their name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from eval import confidence
from eval.confidence import error_of_mean
from eval.measure import Drawn, Measured
from eval.pictures import Pictures
from eval.protocol import versions
from eval.ridge import fitted
from eval.threads import in_parallel
from hdm import torchvision_cpu
from hdm.cli import progress
from hdm.config.errors import AssetError
from hdm.config.schema import Alignment, RunConfig

_BATCH = 64
_ROWS, _TIE = 1024, 1e-12  # rows of a block of cosines; below, two of them are equal
Vectors = NDArray[np.float64]


class Aligner(ABC):
    """One space for images and captions."""

    name: str

    @abstractmethod
    def embed_images(self, pixels: Pictures | UInt8[Tensor, "N 3 H W"], title: str) -> Vectors:
        """Unit vectors (N, D)."""

    @abstractmethod
    def embed_captions(self, captions: Sequence[str]) -> Vectors:
        """Unit vectors (N, D)."""

    @abstractmethod
    def scores(self, cosines: Vectors) -> Vectors:
        """What is reported, as its mean, of N cosines between images and their captions (N,)."""

    def score(self, cosines: Vectors) -> float:
        """The number that is reported."""
        return float(self.scores(cosines).mean())

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the protocol says of it."""


class Clip(Aligner):
    """CLIP score: the mean of 100 max(cos, 0) (Hessel et al., 2021, with their weight of 2.5 left out, as is usual)."""

    name = "clip"

    def __init__(self, path: str, device: torch.device, *, key: str = "eval.clip") -> None:
        """Load a folder or what the hub's local cache holds. Raises AssetError, which names `key`, when it is neither."""
        torchvision_cpu.declare()
        import transformers

        # images go through Pillow, as CLIP's own did; the class has had this name since the other one went to torchvision
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = transformers.CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            self.processor = processor.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = f" ({' '.join(str(error).split())[:200]})" if Path(path).is_dir() else ""
            raise AssetError(
                f"{key}={path}: no CLIP in this folder or in the hub's cache{reason}; run `hf download {path}` where there is a"
                f" network, set {key}=FOLDER{', or eval.alignment=ridge_minilm' if key == 'eval.clip' else ''}"
            ) from None
        self.model, self.device = cast(Any, model).to(device).eval(), device

    def embed_images(self, pixels: Pictures | UInt8[Tensor, "N 3 H W"], title: str) -> Vectors:  # noqa: D102
        def vectors(part: Tensor) -> Tensor:
            images = self.processor(list(part.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
            hidden = self.model.vision_model(pixel_values=images.to(self.device)).pooler_output
            embedded: Tensor = self.model.visual_projection(hidden)
            return embedded.double().cpu()

        rows, pictures = [], Pictures.of(pixels)
        with progress(f"{title}: CLIP", sum(map(len, pictures.parts())), "images") as advance:
            for found in in_parallel(vectors, pictures.batches(_BATCH), device=self.device):
                rows.append(found)
                advance(len(found))
        return unit(torch.cat(rows).numpy())

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Vectors:  # noqa: D102
        rows = []
        for start in range(0, len(captions), _BATCH):
            tokens = self.tokenizer(
                list(captions[start : start + _BATCH]), padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            hidden = self.model.text_model(**tokens.to(self.device)).pooler_output
            rows.append(self.model.text_projection(hidden).double().cpu())
        return unit(torch.cat(rows).numpy())

    def scores(self, cosines: Vectors) -> Vectors:  # noqa: D102
        return np.asarray(100 * np.maximum(cosines, 0))

    def facts(self) -> dict[str, Any]:  # noqa: D102
        from eval.samples import weights_digest

        return {"name": self.name, "weights": weights_digest(self.model), "score": "mean of 100 max(cos, 0)"}


class RidgeMiniLM(Aligner):
    """EfficientNet features through a ridge map into MiniLM's space; both sides are centred on the training means."""

    name = "ridge_minilm"

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        """Fit on the training split, or take it from the cache. Raises AssetError without the packages that carry weights."""
        from eval.extractor import named
        from eval.ridge import SentenceEncoder

        self.run, self.device = run, device
        self.extractor = named("efficientnet", run.eval)
        self.sentences = SentenceEncoder(Path(run.cache), device)
        self.map = fitted(run, self.extractor, self.sentences, device)

    def embed_images(self, pixels: Pictures | UInt8[Tensor, "N 3 H W"], title: str) -> Vectors:  # noqa: D102
        from eval.features import features

        return unit(self.map.predict(features(pixels, self.extractor, cache=Path(self.run.cache), device=self.device, title=title)))

    def embed_captions(self, captions: Sequence[str]) -> Vectors:  # noqa: D102
        return unit(self.sentences.encode(captions) - self.map.text_mean)

    def scores(self, cosines: Vectors) -> Vectors:  # noqa: D102
        return cosines

    def facts(self) -> dict[str, Any]:  # noqa: D102
        return {
            "name": self.name,
            "extractor": self.extractor.facts(),
            "sentences": self.sentences.digest,
            "fitted_on": self.map.source,
            "lambda": self.map.penalty,
            "score": "mean cosine, both sides centred on the training split",
        }


def require(run: RunConfig, **_: Any) -> None:
    """Raise AssetError when the aligner that is asked for is not here."""
    if run.eval.alignment is not Alignment.ridge_minilm:
        try:
            Clip(run.eval.clip, torch.device("cpu"))
            return
        except AssetError:
            if run.eval.alignment is Alignment.clip:
                raise
    from eval.extractor import named

    named("efficientnet", run.eval)


def resolve(drawn: Drawn) -> Aligner:
    """The aligner that `eval.alignment` asks for. Raises AssetError when it cannot be had here."""
    run, wanted = drawn.run, drawn.run.eval.alignment
    if wanted is Alignment.ridge_minilm:
        return RidgeMiniLM(run, drawn.device)
    try:
        return Clip(run.eval.clip, drawn.device)
    except AssetError as error:
        if wanted is Alignment.clip:
            raise
        _warn(drawn.console, error)
        return RidgeMiniLM(run, drawn.device)


def _warn(console: Console, error: AssetError) -> None:
    console.print(
        "[bold yellow]Alignment uses ridge_minilm, a map fitted on the training split, not CLIP: its numbers compare with each"
        f" other, not with CLIP scores[/] ({error})",
        highlight=False,
    )


def measure(drawn: Drawn) -> Measured:
    """`alignment/NAME`, retrieval in both directions, and the same of the real images as the mark to reach (`…_real`).

    `alignment/NAME_i2t_rK` is image-to-text, `_t2i_rK` text-to-image recall at K.
    """
    aligner = resolve(drawn)
    captions = aligner.embed_captions(drawn.real.captions)
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for suffix, title, pictures in (("", "generated images", drawn.pictures), ("_real", "real images", drawn.real.pictures)):
        images = aligner.embed_images(pictures, title)
        own = np.arange(len(images)) % len(captions)
        name = f"alignment/{aligner.name}"
        found = {name: aligner.scores((images * captions[own]).sum(axis=1))}
        for k in drawn.run.eval.recall:
            found[f"{name}_i2t_r{k}"] = image_to_text(images, captions, k=k, own=own)
            found[f"{name}_t2i_r{k}"] = text_to_image(images, captions, k=k, own=own)
        values |= {f"{key}{suffix}": float(each.mean()) for key, each in found.items()}
        if not suffix and drawn.weights is not None:
            rounds = len(drawn.weights)
            errors = {key: error_of_mean(each, confidence.weights(len(each), rounds)) for key, each in found.items()}
    candidates = {"captions": len(captions), "images": drawn.count}
    return Measured(
        values=values,
        errors=errors,
        protocol={"aligner": aligner.facts(), "candidates": candidates, "versions": versions(["torch", "transformers"])},
    )


def image_to_text(images: Vectors, captions: Vectors, *, k: int, own: NDArray[np.int64]) -> Vectors:
    """1 for each image whose caption, number `own`, is among the `k` nearest, else 0: (N,). An equally near one costs nothing."""
    found = []
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        cosines = images[rows] @ captions.T
        mine = (images[rows] * captions[own[rows]]).sum(axis=1, keepdims=True)
        found.append((cosines > mine + _TIE).sum(axis=1) < k)
    return np.concatenate(found).astype(np.float64)


def text_to_image(images: Vectors, captions: Vectors, *, k: int, own: NDArray[np.int64]) -> Vectors:
    """1 for each caption of which an image, one whose number in `own` it is, is among the `k` nearest, else 0: (captions,)."""
    nearest = np.full(len(captions), -np.inf)
    np.maximum.at(nearest, own, (images * captions[own]).sum(axis=1))
    found = []
    for start in range(0, len(captions), _ROWS):
        rows = slice(start, start + _ROWS)
        found.append((captions[rows] @ images.T > nearest[rows, None] + _TIE).sum(axis=1) < k)
    return np.concatenate(found).astype(np.float64)


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length one."""
    scaled: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled
