"""What the frozen encoders cost by how they are fed: padding, packing, chunks, with --compile also torch.compile. Interleaved runs.

usage: python -m benchmarks.conditioning [rounds=5] [captions=64] [--compile]

Networks of the real architectures with random weights, written to a temporary folder in the published format and read by the
laboratory: Qwen3 of 8 layers of 256 channels, the SDXL autoencoder at a quarter of its width. Captions have 2 to 256 words, the
logarithms of their numbers being normal (median 60, sigma 0.7), as lists of tags have; a word is a token.
"""

import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hdm import cli, torchvision_cpu
from hdm.conditioning.autoencoder import KL, KLConfig
from hdm.conditioning.text_encoder import PretrainedTextEncoder, Qwen3, Qwen3Config
from hdm.rng import generator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_LENGTH, PART = 256, 16
IMAGES, SIDE = 16, 128
WORDS = [first + second for first, second in itertools.product(("ka", "mo", "ti", "lu", "se", "pra"), repeat=2)]


def qwen3(folder: Path) -> None:
    import transformers

    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator([" ".join(WORDS)] * 3, 2000)
    tokenizer.save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def sdxl_vae(folder: Path, *, width: int = 32) -> None:
    """The autoencoder of SDXL, whose first level has 128 channels, with `width` of them."""
    import diffusers

    diffusers.AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), layers_per_block=2, latent_channels=4,
        norm_num_groups=min(32, width), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip


def drawn(count: int) -> list[str]:
    draw = generator(0, "benchmark", "captions")
    lengths = np.clip(np.exp(draw.normal(np.log(60), 0.7, count)), 2, MAX_LENGTH).astype(int)
    return [" ".join(draw.choice(WORDS, n)) for n in lengths]


def fully_padded(encoder: PretrainedTextEncoder, captions: list[str]) -> torch.Tensor:
    """The states of captions that are padded to the longest that may be, as the report's code does, in the laboratory's chunks."""
    found = encoder.tokenizer(captions, truncation=True, max_length=MAX_LENGTH, padding="max_length", return_tensors="pt").to(
        DEVICE
    )
    size = PART if DEVICE == "cpu" else len(captions)
    with torch.no_grad():
        parts = [
            encoder.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            for ids, mask in zip(found["input_ids"].split(size), found["attention_mask"].split(size))
        ]
    return torch.cat(parts)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def megabytes(work: Callable[[], object]) -> float:
    """What memory grows by while `work` runs, at its peak."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1e3


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def compare(title: str, arms: dict[str, Callable[[], object]], *, rounds: int, unit: str, amount: int) -> None:
    """Run the arms in turn, the first one being the baseline; print medians of what is done in a second, and of the ratios."""
    first = {name: seconds(work) for name, work in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, work in arms.items():
            times[name].append(seconds(work))
    baseline = next(iter(times.values()))
    print(f"\n| {title} | {unit}/s | speed / first row | first pass (s) | peak (MB) |\n|---|---|---|---|---|")
    for name, own in times.items():
        ratio = statistics.median(b / t for b, t in zip(baseline, own))
        print(
            f"| {name} | {amount / statistics.median(own):,.3g} | {ratio:.2f} | {first[name]:.2f} | {megabytes(arms[name]):,.0f} |",
            flush=True,
        )


def command(arguments: list[str]) -> None:
    """Measure and print Markdown tables."""
    rounds, count = (int(cli.take_option(arguments, key) or default) for key, default in (("rounds", 5), ("captions", 64)))
    compiling = cli.take_flag(arguments, "--compile")
    cli.reject_unknown(arguments, "usage: python -m benchmarks.conditioning [rounds=5] [captions=64] [--compile]")
    torchvision_cpu.declare()
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        text, vae = Path(folder) / "text", Path(folder) / "vae"
        qwen3(text)
        sdxl_vae(vae)

        def encoder(**fields: Any) -> Qwen3:
            config = Qwen3Config(path=str(text), width=256, max_length=MAX_LENGTH, **fields)
            return Qwen3(config, cache=Path(folder), device=DEVICE)

        def autoencoder(**fields: Any) -> KL:
            return KL(KLConfig(path=str(vae), **fields), cache=Path(folder), device=DEVICE)

        captions = drawn(count)
        trimmed, packed = encoder(), encoder(packing=True)
        states, mask = trimmed.encode(captions)
        lengths = mask.sum(dim=1)
        least, mean, most = int(lengths.min()), float(lengths.float().mean()), int(lengths.max())
        print(f"\n{count} captions of {least} to {most} tokens, {mean:.0f} on average")
        arms = {
            "padded to 256": lambda: fully_padded(trimmed, captions),
            "trimmed (default)": lambda: trimmed.encode(captions),
            "packed": lambda: packed.encode(captions),
        }
        compare("text", arms, rounds=rounds, unit="tokens", amount=int(lengths.sum()))
        full = fully_padded(trimmed, captions)[:, : states.shape[1]]
        for name, other in (("padded", full), ("packed", packed.encode(captions)[0])):
            print(f"largest difference of a state, {name} - trimmed: {float((other - states)[mask].abs().max()):.1e}")

        pixels = torch.rand(IMAGES, 3, SIDE, SIDE, device=DEVICE) * 2 - 1
        chunked = {n: autoencoder(chunk=n) for n in (4, 1, 16)}
        images: dict[str, Callable[[], object]] = {
            f"chunk={n}": lambda held=held: held.encode(pixels, None) for n, held in chunked.items()
        }
        compare(f"{IMAGES} images of {SIDE} px", images, rounds=rounds, unit="images", amount=IMAGES)
        latents = chunked[4].encode(pixels, None)
        for n in (1, 16):
            print(f"largest difference of a latent, chunk={n} - chunk=4: {_apart(chunked[n].encode(pixels, None), latents):.1e}")
        if not compiling:
            return

        compiled_vae = autoencoder(compile=True)
        images = {"chunk=4": images["chunk=4"], "chunk=4, compiled": lambda: compiled_vae.encode(pixels, None)}
        compare("autoencoder.compile", images, rounds=rounds, unit="images", amount=IMAGES)
        print(f"largest difference of a latent, compiled - eager: {_apart(compiled_vae.encode(pixels, None), latents):.1e}")
        text_encoder = encoder(compile=True)
        arms = {"trimmed": arms["trimmed (default)"], "trimmed, compiled": lambda: text_encoder.encode(captions)}
        compare("text_encoder.compile", arms, rounds=rounds, unit="tokens", amount=int(lengths.sum()))
        print(f"largest difference of a state, compiled - eager: {_apart(text_encoder.encode(captions)[0], states):.1e}")


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    cli.main(command, __doc__)
