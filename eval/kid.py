"""KID of a checkpoint against the held-out images: the distance to read below some thousands of images.

usage: python -m eval.kid ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.kid ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.kid ckpt=runs/openmoji_nano-s0-1f0c77ab protocol=fast_1k

Unbiased at any number of images: two sets of one kind give 0 on average. `python -m eval.fid` gives it beside FID.

eval.samples=512      images
eval.features=auto    auto | inception | efficientnet | dinov2 | clip | a plug-in's; auto: inception if here, else efficientnet
eval.seed=0           noise seed
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.kid`."""
    from eval.command import run

    run("kid", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
