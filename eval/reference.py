"""Features of the real images as one file, to compare with on another machine that does not have the images.

usage: python -m eval.reference ckpt=RUN_OR_CHECKPOINT out=FILE.safetensors [KEY=VALUE ...]

  python -m eval.reference ckpt=runs/openmoji_nano-s0-1f0c77ab out=openmoji-val.safetensors
  python -m eval.fid ckpt=runs/OTHER reference=openmoji-val.safetensors

The file holds features, mean and covariance of the images that `eval.reference=val` or `train` means for this run, the extractor
with the digest of its weights, and the digest of the images, by which a protocol knows them. Numbers from the file and from the
images themselves have equal protocols.

eval.reference=val    val | train
eval.samples=512      images, at most what the split has
eval.features=auto    auto | inception | efficientnet | dinov2 | clip, or a plug-in's (python -m eval.fd --help)
Also: eval.whole, device, datasets, cache (docs/evaluation.md).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.errors import DataError, HdmError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eval.extractor import Extractor
    from eval.measure import Drawn

FORMAT = "1"


@dataclass(kw_only=True, slots=True)
class Reference:
    """Features (N, D) of real images and the digest of those images."""

    features: "NDArray[np.float64]"
    digest: str


def reference(drawn: "Drawn", extractor: "Extractor") -> Reference:
    """What `eval.reference` means for `extractor`: the held-out images, the training images, or a file. Raises DataError."""
    from eval.features import features

    wanted = drawn.run.eval.reference
    if wanted.endswith(".safetensors"):
        return load(Path(wanted), extractor)
    real = drawn.reference
    found = features(real.pixels, extractor, cache=drawn.cache, device=drawn.device, title=f"real images ({wanted})")
    return Reference(features=found, digest=real.digest)


def load(path: Path, extractor: "Extractor | None" = None) -> Reference:
    """The reference in a file. Raises DataError for a file that is none, or of another extractor."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts, values = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"reference={path}: cannot be read ({' '.join(str(error).split())}); make one: python -m eval.reference out={path}"
        ) from None
    if facts.get("format") != FORMAT:
        raise DataError(f"reference={path}: is not a reference of this version; make one: python -m eval.reference out={path}")
    own = json.loads(facts["extractor"])
    if extractor is not None and own != extractor.facts():
        from hdm.track.protocol import differences

        raise DataError(
            f"reference={path}: its features are of another extractor ({differences(own, extractor.facts())[0]}); set"
            f" eval.features={own['name']} with the same weights, or make another file"
        )
    return Reference(features=values.astype(np.float64), digest=facts["images"])


def save(found: Reference, extractor: "Extractor", path: Path) -> None:
    """Write a reference as one file."""
    import numpy as np
    from safetensors.numpy import save_file

    from eval.frechet import Moments
    from hdm.files import replacing

    moments = Moments.of([found.features])
    arrays = {"features": found.features.astype(np.float32), "mean": moments.mean, "covariance": moments.covariance}
    facts = {"format": FORMAT, "extractor": json.dumps(extractor.facts()), "images": found.digest, "count": str(moments.count)}
    with replacing(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, metadata=facts)


def command(arguments: list[str]) -> None:
    """`python -m eval.reference`."""
    from eval.command import subject

    out = cli.take_option(arguments, "out")
    if not out or not out.endswith(".safetensors"):
        raise HdmError(f"out={out or ''}: name a file that ends in .safetensors")
    found = subject("reference", arguments)
    if found.run.eval.reference.endswith(".safetensors"):
        raise HdmError(f"eval.reference={found.run.eval.reference}: is a file already; choose val or train")
    from eval.extractor import resolve
    from eval.metrics import prepare

    drawn: Any = prepare(found)
    extractor = resolve(found.run.eval, drawn.console)
    made = reference(drawn, extractor)
    save(made, extractor, Path(out))
    print(f"{out}: {len(made.features)} images of {found.run.eval.reference}, digest {made.digest}, extractor {extractor.name}")


if __name__ == "__main__":
    cli.main(command, __doc__)
