"""CMMD of a checkpoint: the Gaussian-kernel distance in CLIP's embeddings (Jayasumana et al., 2024).

usage: python -m eval.cmmd ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.cmmd ckpt=runs/NAME eval.clip=/models/clip-vit-large-patch14-336

1000 times the squared MMD at sigma 10; the paper's network is CLIP ViT-L/14 at 336 px, and its estimate the biased one. Both are
given.

eval.clip=NAME        CLIP: a folder, or a hub name that the local cache holds
eval.samples=512      images
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.cmmd`."""
    from eval.command import run

    run("cmmd", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
