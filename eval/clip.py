"""Text-image alignment of a checkpoint on the held-out captions.

usage: python -m eval.clip ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay|ema:WIDTH] [KEY=VALUE ...]

  python -m eval.clip ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.clip ckpt=runs/openmoji_nano-s0-1f0c77ab eval.alignment=clip eval.clip=/models/clip-vit-large-patch14

Reported are the score of the generated images with their captions; retrieval R@5, image to text (_i2t_r5: images whose own caption
is among the 5 nearest of all) and text to image (_t2i_r5: captions that have an image of theirs among the 5 nearest); and the same
of the real images (_real), the mark to reach. `ridge_minilm` is a map fitted on the training split, for machines
without CLIP weights; its numbers are no CLIP scores. The numbers go to eval/ in the run folder and into the run's MLflow page,
with their protocol.

eval.samples=512      images, at most what the val split has
eval.alignment=auto   auto | clip | ridge_minilm; auto is clip where its weights are, else ridge_minilm, and says so
eval.recall=[5]       K of R@K, such as [1,5,10]
eval.clip=NAME        CLIP: a folder, or a hub name that the local cache holds
eval.seed=0           noise seed
Also: sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.clip`."""
    from eval.command import run

    run("clip", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
