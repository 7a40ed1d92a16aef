"""Precision, recall, density and coverage of a checkpoint against the held-out images.

usage: python -m eval.prdc ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.prdc ckpt=runs/openmoji_nano-s0-1f0c77ab

Precision and density: how many generated images lie among the real ones. Recall and coverage: how much of the real ones they
reach. Balls reach to the fifth neighbour; all four depend on the number of images.

eval.samples=512      images
eval.features=auto    auto | inception | efficientnet | dinov2 | clip | a plug-in's; auto: inception if here, else efficientnet
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.prdc`."""
    from eval.command import run

    run("prdc", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
