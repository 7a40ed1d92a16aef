"""Fréchet and kernel distance of a checkpoint in the features of any extractor, a plug-in's too.

usage: python -m eval.fd ckpt=RUN_OR_CHECKPOINT [eval.features=NAME] [plugins=[MODULE,...]] [KEY=VALUE ...]

  python -m eval.fd ckpt=runs/NAME eval.features=clip eval.clip=/models/clip-vit-large-patch14
  python -m eval.fd ckpt=runs/NAME plugins=[my_lab.extractors] eval.features=brightness

`fd/NAME` is the squared Fréchet distance, `kd/NAME` the kernel distance that is KID in Inception's features: unbiased, and the one
to read with few images. How an extractor of your own is registered is at the top of eval/extractor.py.

eval.features=auto    auto | inception | efficientnet | dinov2 | clip, or a plug-in's
eval.samples=512      images
reference=val         val | train | FILE.safetensors of python -m eval.reference
Also: protocol=NAME, sampler.*, guidance.*, sampling.batch_size, device, datasets, cache, track.* (docs/evaluation.md).
"""

from hdm import cli


def command(arguments: list[str]) -> None:
    """`python -m eval.fd`."""
    from eval.command import run

    run("fd", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
