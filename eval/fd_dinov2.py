"""Fréchet and kernel distance of a checkpoint in DINOv2's features (Stein et al., 2023).

usage: python -m eval.fd_dinov2 ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.fd_dinov2 ckpt=runs/NAME eval.dinov2=/models/dinov2-large

Class token of DINOv2 ViT-L/14 at 224 px, unless another is named; the weights are needed.

eval.dinov2=NAME      a folder, or a hub name that the local cache holds
eval.samples=512      images
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.fd_dinov2`."""
    from eval.command import run

    run("fd_dinov2", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
