"""What the frozen networks give, read from the disk instead of computed (`autoencoder.cache`, `text_encoder.cache`).

Entries are found by content: a posterior by the pixels of its crop, states by their caption. What is read is hence what would have
been computed, whatever the order, the number of workers and processes; the draw from the posterior stays keyed by the sample.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hdm.conditioning.autoencoder import Posterior, PretrainedAutoencoder
from hdm.conditioning.store import Place, Store, key
from hdm.conditioning.text_encoder import PretrainedTextEncoder
from hdm.config.axes import AUTOENCODER, CROP, TEXT_ENCODER
from hdm.config.errors import DataError
from hdm.config.schema import RunConfig, Storage

STORED = {Storage.fp32: torch.float32, Storage.bf16: torch.bfloat16, Storage.fp16: torch.float16}


def wanted(config: Any) -> bool:
    """Whether an encoder's configuration asks for a cache."""
    return getattr(config, "cache", Storage.none) is not Storage.none


def latent_place(run: RunConfig, autoencoder: PretrainedAutoencoder, *, data: str) -> Place:
    """Where the posteriors of `run` are kept; `data` is the digest of its training data."""
    settings = {
        "data": data,
        "crop": CROP.of(run.crop).name,
        **{f"crop.{field.name}": getattr(run.crop, field.name) for field in dataclasses.fields(run.crop)},
        "autoencoder": AUTOENCODER.of(run.autoencoder).name,
        "autoencoder.dtype": _name(autoencoder.dtype),
        "autoencoder.cache": run.autoencoder.cache.value,
        "the autoencoder's weights": weights_digest(autoencoder.network.encoder, getattr(autoencoder.network, "quant_conv", None)),
    }
    return Place(axis="autoencoder", root=Path(run.cache) / "latents", name=settings["autoencoder"], settings=settings)


def text_place(run: RunConfig, encoder: PretrainedTextEncoder, *, data: str) -> Place:
    """Where the text states of `run` are kept; `data` is the digest of its training data."""
    captions = {f"captions.{name}": value for name, value in dataclasses.asdict(run.captions).items() if name != "text_dropout"}
    settings = {
        "data": data,
        **captions,
        "text_encoder": TEXT_ENCODER.of(run.text_encoder).name,
        "text_encoder.max_length": run.text_encoder.max_length,
        "text_encoder.dtype": _name(encoder.network.dtype),
        "text_encoder.cache": run.text_encoder.cache.value,
        "the text encoder's weights": weights_digest(encoder.network),
        "the tokenizer": hashlib.sha256(encoder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16],
    }
    return Place(axis="text_encoder", root=Path(run.cache) / "text", name=settings["text_encoder"], settings=settings)


def weights_digest(*modules: nn.Module | None) -> str:
    """A digest of the names, shapes and values of all parameters and buffers, as loaded."""
    digest = hashlib.sha256()
    for module in filter(None, modules):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def crop_key(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The key of a crop, (height, width, 3) as bytes."""
    return key(str(pixels.shape).encode(), np.ascontiguousarray(pixels).tobytes())


def caption_key(caption: str) -> bytes:
    """The key of a caption."""
    return key(caption.encode())


class CachedLatents:
    """In the place of `Autoencoder.encode` for training crops."""

    def __init__(self, run: RunConfig, autoencoder: PretrainedAutoencoder, *, data: str) -> None:
        """Raises DataError where there is no complete cache for this run."""
        self.autoencoder = autoencoder
        self.store = Store(latent_place(run, autoencoder, data=data))

    def encode(
        self, pixels: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"], names: Sequence[str]
    ) -> Float[Tensor, "B C h w"]:
        """Latents of `pixels`, on the CPU as the loader gives them; `names` are those of their records, for messages."""
        exact = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        entries = self.store.find([crop_key(crop) for crop in exact])
        missing = [name for name, entry in zip(names, entries) if entry is None]
        if missing:
            raise DataError(
                f"autoencoder.cache: {len(missing)} of {len(names)} crops, the first of record {missing[0]}, are not in"
                f" {self.store.place.folder}: images are decoded otherwise here than where it was filled; remove it and"
                f" {self.store.place.remedy}"
            )
        rows = [self.store.read(entry) for entry in entries if entry is not None]
        mean, std = (
            torch.stack([row[name] for row in rows]).float().to(noise.device, non_blocking=True) if name in rows[0] else None
            for name in ("mean", "std")
        )
        assert mean is not None
        return self.autoencoder.normalised(Posterior(mean, std).draw(noise))


class CachedStates:
    """In the place of `TextEncoder.encode` for training captions."""

    def __init__(self, run: RunConfig, encoder: PretrainedTextEncoder, *, data: str) -> None:
        """Raises DataError where there is no complete cache for this run."""
        self.encoder = encoder
        self.store = Store(text_place(run, encoder, data=data))

    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """States and mask of `captions`, padded and trimmed as the encoder does it."""
        distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        entries = self.store.find([caption_key(caption) for caption in distinct])
        rows = []
        for caption, entry in zip(distinct, entries):
            if entry is None:
                place = self.store.place
                raise DataError(f"text_encoder.cache: the caption '{caption[:60]}' is not in {place.folder}; {place.remedy}")
            rows.append(self.store.read(entry)["states"])
        lengths = torch.tensor([len(row) for row in rows])
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
        index = torch.tensor([distinct[caption] for caption in captions])
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        device = self.encoder.device
        return states[index].to(device, non_blocking=True), mask[index].to(device, non_blocking=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
