"""The protocol of a number: everything that it depends on besides the weights. Only numbers with equal digests may be compared.

How protocols are compared needs no images and is in `hdm.track.protocol`, where reports find it too.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Sequence
from enum import Enum
from typing import Any

from hdm.config.axes import AXES
from hdm.config.schema import RunConfig
from hdm.track.protocol import differences, digest, require_equal

__all__ = ["differences", "digest", "require_equal", "sampling_protocol", "text_digest", "versions"]

PIXELS = "[-1, 1] to bytes by rounding (x + 1) 127.5"
RESIZE = "real images: Pillow bicubic on bytes, the crop box resampled from the image; generated images: none"
VIEW = "generated images take the view (crop box, full size) of the held-out crop that their caption belongs to"


def sampling_protocol(
    run: RunConfig,
    *,
    weights: str,
    samples: int,
    size: tuple[int, int] | None,
    prompts: str,
    reference: str,
    weak: str | None = None,
) -> dict[str, Any]:
    """How the images were drawn; `prompts` and `reference` are digests of the captions and of the real images.

    `size` is (H, W) in pixels, None for whole images in their own aspect ratios.

    `weak` is that of the other network's weights, for guidance=autoguidance: they count, not the folder that they lay in.
    """
    guidance = _variant("guidance", run.guidance)
    return {
        "reference": reference,
        "prompts": prompts,
        "samples": samples,
        "size": f"{size[0]}x{size[1]}" if size else f"whole images of about {run.crop.size}x{run.crop.size}",
        "view": VIEW,
        "pixels": PIXELS,
        "resize": {"filter": RESIZE, **versions(["pillow"])},
        "sampler": _variant("sampler", run.sampler),
        "guidance": guidance if weak is None else {**guidance, "ckpt": weak},
        "weights": weights,
        "ema": {"ema-power": run.ema.power, "ema-decay": run.ema.decay}.get(weights),
        "precision": run.train.precision.name,
        "seed": run.eval.seed,
    }


def text_digest(captions: Sequence[str]) -> str:
    """A digest of captions, in order."""
    return hashlib.blake2b("\n".join(captions).encode(), digest_size=16).hexdigest()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the libraries that compute a metric, without the local part that names a build (2.13.0+cpu)."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in packages}


def _variant(axis: str, config: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {
        "name": AXES[axis].of(config).name,
        **{key: value.name if isinstance(value, Enum) else value for key, value in fields.items()},
    }
