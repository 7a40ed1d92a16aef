"""How large the caches of a run would be, counted and not made."""

from collections.abc import Iterator

from hdm.conditioning.autoencoder import KLConfig, PretrainedAutoencoderConfig
from hdm.conditioning.text_encoder import PretrainedTextEncoderConfig
from hdm.config.compose import stage_run
from hdm.config.schema import RunConfig, Storage

_BYTES = {Storage.none: 2, Storage.fp32: 4, Storage.bf16: 2, Storage.fp16: 2}  # what is not asked for is counted in 16 bits


def latent_bytes(run: RunConfig) -> int:
    """Bytes of one crop: its mean, and its standard deviation where the encoder has a posterior; 0 without an encoder."""
    config = run.autoencoder
    if not isinstance(config, PretrainedAutoencoderConfig):
        return 0
    numbers = config.channels * (run.crop.size // config.factor) ** 2
    return int(numbers * (2 if isinstance(config, KLConfig) else 1) * _BYTES[config.cache])


def text_bytes(run: RunConfig) -> int:
    """Bytes of one caption of as many tokens as may be; 0 without a network."""
    config = run.text_encoder
    if not isinstance(config, PretrainedTextEncoderConfig):
        return 0
    return int(config.max_length * config.width * _BYTES[config.cache])


def report_bytes(run: RunConfig) -> int:
    """Bytes of one image as the report counts them (spec 1.3 t): a latent of 16 channels at f8, one number each, and one text."""
    return int(2 * 16 * (run.crop.size // 8) ** 2 + 2 * run.text_encoder.max_length * run.text_encoder.width)


def cache_notes(run: RunConfig) -> Iterator[str]:
    """What the plan says: sizes for every stage whose number of images is known, and in all."""
    stages = [(stage.images, stage_run(run, stage)) for stage in run.stages]
    known = [(images or getattr(own.data, "images", None), own) for images, own in stages or [(None, run)]]
    sized = [(images, own) for images, own in known if images]
    if len(sized) < len(known) or not (any(map(_latents, sized)) or any(map(_text, sized))):
        return
    crops = run.crop.places or 1
    for axis, sizes, what in (
        ("autoencoder", [*map(_latents, sized)], f"mean and std of {crops} crop{'s' * (crops > 1)} an image"),
        ("text_encoder", [*map(_text, sized)], "one caption an image, of as many tokens as may be"),
    ):
        each, kept = " + ".join(map(_size, sizes)), getattr(getattr(run, axis), "cache", Storage.none).value
        total = f" = {_size(sum(sizes))}" if len(sizes) > 1 else ""
        if any(sizes):
            yield f"{axis}.cache={kept}; on the disk it takes {each}{total} ({what})"
    if len(sized) > 1:
        largest = max((own for _, own in sized), key=report_bytes)
        total = _size(sized[0][0] * report_bytes(largest))
        yield f"caches as the report counts them (f8c16 latents and text of the largest stage, images of the first): {total}"


def _latents(stage: tuple[int, RunConfig]) -> int:
    images, run = stage
    return images * latent_bytes(run) * int(run.crop.places or 1)


def _text(stage: tuple[int, RunConfig]) -> int:
    images, run = stage
    return images * text_bytes(run)


def _size(size: int) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e10 else f"{size / 1e9:.3g} GB"
