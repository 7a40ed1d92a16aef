"""Every metric of a checkpoint that can be had here, from one set of images; what lacks weights is named and left out.

usage: python -m eval.all ckpt=RUN_OR_CHECKPOINT [protocol=NAME] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.all ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.all ckpt=runs/openmoji_nano-s0-1f0c77ab protocol=fast_1k
  torchrun --nproc-per-node=8 -m eval.all ckpt=runs/NAME protocol=paper_10k     all processes draw, the first one measures

fid (with KID), prdc, fd_dinov2, cmmd, clip, valloss, memorisation, preference. `± sampling` is the standard error over the drawn
images (bootstrap); the spread over training seeds is another matter and usually larger.

protocol=NAME         fast_1k | paper_10k | paper_50k | coco30k: how many images, how drawn, compared with what
eval.samples=512      images
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: all options of the single commands (docs/evaluation.md).
"""

from hdm import cli
from hdm.config.schema import Metric

_ALL = [metric for metric in Metric if metric not in (Metric.kid, Metric.fd)]  # fid includes kid, and fd is another name for both


def command(arguments: list[str]) -> None:
    """`python -m eval.all`."""
    from eval.command import run

    run(_ALL, arguments, command="all")


if __name__ == "__main__":
    cli.main(command, __doc__)
