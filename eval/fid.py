"""FID and KID of a checkpoint against the held-out images.

usage: python -m eval.fid ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay|ema:WIDTH] [KEY=VALUE ...]

  python -m eval.fid ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.fid ckpt=runs/openmoji_nano-s0-1f0c77ab eval.samples=256 sampler.steps=16 guidance.scale=2

One image is drawn for each held-out caption, with the crop and aspect ratio of its real image; KID is the one to read below some
thousands of images, where FID is biased. The numbers go to eval/ in the run folder and into the run's MLflow page, with their
protocol.

eval.samples=512      images, at most what the val split has
eval.features=auto    auto | inception | efficientnet | dinov2 | clip | a plug-in's; auto: inception if here, else efficientnet
eval.inception=FILE   the Inception weights, where they are not in torch's hub folder
eval.seed=0           noise seed
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.fid`."""
    from eval.command import run

    run("fid", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
