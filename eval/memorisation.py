"""Has the network learnt its training images by heart? Each generated image beside its nearest training image.

usage: python -m eval.memorisation ckpt=RUN_OR_CHECKPOINT [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.memorisation ckpt=runs/openmoji_nano-s0-1f0c77ab

An image is authentic when its nearest training image has another training image that is nearer still (Alaa et al., 2022). A
network that copies has a low fraction of authentic images; `_real` is that of the held-out images, which are no copies.
`distance` is the mean distance to the nearest training image over that of the held-out images; well below 1 means copies. The
sheet shows the nearest pairs.

eval.samples=512      images
eval.features=auto    auto | inception | efficientnet | dinov2 | clip, or a plug-in's (python -m eval.fd --help)
Also: sampler.*, guidance.*, protocol=NAME, device, datasets, cache, track.* (docs/evaluation.md).
"""

from typing import TYPE_CHECKING, Any

from hdm import cli

if TYPE_CHECKING:
    from eval.measure import Drawn, Measured
    from hdm.config.schema import RunConfig

_SHOWN = 16


def require(run: "RunConfig", **_: Any) -> None:
    """Raise AssetError when the extractor that is asked for is not here."""
    from rich.console import Console

    from eval.extractor import resolve

    resolve(run.eval, Console(quiet=True))


def measure(drawn: "Drawn") -> "Measured":
    """`memorisation/authentic` and `memorisation/distance`, and a sheet of the pairs that are most alike."""
    import torch

    from eval.confidence import error_of_mean
    from eval.extractor import resolve
    from eval.features import features
    from eval.manifold import nearest, radii
    from eval.measure import Measured
    from eval.protocol import versions

    extractor = resolve(drawn.run.eval, drawn.console)

    def vectors(pixels: Any, title: str) -> torch.Tensor:
        return torch.from_numpy(features(pixels, extractor, cache=drawn.cache, device=drawn.device, title=title))

    train = vectors(drawn.training.pixels, "training images")
    own_nearest = radii(train, 1)
    found = {}
    for suffix, pixels, title in (("", drawn.pictures, "generated images"), ("_real", drawn.real.pixels, "real images")):
        distance, which = nearest(vectors(pixels, title), train)
        found[suffix] = distance, which, (distance > own_nearest[which]).double().numpy()
    distance, which, authentic = found[""]
    typical = float(found["_real"][0].mean())
    values = {
        "memorisation/authentic": float(authentic.mean()),
        "memorisation/authentic_real": float(found["_real"][2].mean()),
        "memorisation/distance": float(distance.mean()) / typical,
    }
    errors = {}
    if drawn.weights is not None:
        errors = {
            "memorisation/authentic": error_of_mean(authentic, drawn.weights),
            "memorisation/distance": error_of_mean(distance.numpy(), drawn.weights) / typical,
        }
    _sheet(drawn, distance / typical, which)
    facts = {"extractor": extractor.facts(), "training": drawn.training.digest, "versions": versions(["torch", "torch-fidelity"])}
    return Measured(values=values, errors=errors, protocol=facts)


def _sheet(drawn: "Drawn", distance: Any, which: Any) -> None:
    """The pairs that are most alike, the nearest first, as a picture in the run folder."""
    if drawn.folder is None:
        return
    from hdm.pictures import sheet

    chosen = distance.argsort()[:_SHOWN].tolist()
    left, right = drawn.pictures.take(chosen), drawn.training.pictures.take([int(which[i]) for i in chosen])
    captions = drawn.captions
    labels = [
        text
        for i in chosen
        for text in (f"{captions[i]} ({float(distance[i]):.2f})", f"training: {drawn.training.captions[int(which[i])]}")
    ]
    sheet([image for pair in zip(left, right) for image in pair], labels, columns=8).save(drawn.folder / "memorisation.png")


def command(arguments: list[str]) -> None:
    """`python -m eval.memorisation`."""
    from eval.command import run

    run("memorisation", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
