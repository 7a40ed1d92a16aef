"""How far the latents of a crop are from the same place in the latents of the whole image.

usage: python -m benchmarks.crop_latents [width=32] [side=256] [path=FOLDER_OR_HUB_ID]

An image of side x 2 side is encoded whole, and as the square in its middle; a row gives the relative difference of the means,
||whole - crop|| / ||crop||, by the distance of a latent from the two edges that were cut. The network is the autoencoder of SDXL at
`width` channels of its 128, with random weights, unless `path` names another. Images are noise with a photograph's 1/f spectrum.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.conditioning import sdxl_vae
from hdm import cli, torchvision_cpu
from hdm.conditioning.autoencoder import KL, KLConfig

RINGS = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
IMAGES = 2


def pictures(side: int) -> Tensor:
    """Noise whose amplitudes fall as 1/f, in [-1, 1]."""
    height, width = side, 2 * side
    down, across = torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width)[None] * width
    spectrum = torch.fft.rfft2(torch.randn(IMAGES, 3, height, width)) / (down**2 + across**2).sqrt().clamp(min=1)
    images = torch.fft.irfft2(spectrum, s=(height, width))
    return (images / (3 * images.std())).clamp(-1, 1)


def command(arguments: list[str]) -> None:
    """Measure and print a Markdown table."""
    width, side = (int(cli.take_option(arguments, key) or default) for key, default in (("width", 32), ("side", 256)))
    path = cli.take_option(arguments, "path")
    cli.reject_unknown(arguments, "usage: python -m benchmarks.crop_latents [width=32] [side=256] [path=FOLDER_OR_HUB_ID]")
    torchvision_cpu.declare()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            sdxl_vae(Path(folder), width=width)
        autoencoder = KL(KLConfig(path=path or folder, chunk=1), cache=Path(folder))
        images, factor = pictures(side), autoencoder.downsampling()
        first = (side // 2) // factor
        columns = slice(first, first + side // factor)
        whole = autoencoder.posterior(images).mean[..., columns]
        crop = autoencoder.posterior(images[..., first * factor : first * factor + side]).mean
    crop_ = crop - crop.mean(dim=(0, 2, 3), keepdim=True)
    print(f"{path or f'SDXL autoencoder, {width} of 128 channels, random weights'}, crops of {side} px from {side} x {2 * side}\n")
    print("| latents from a cut edge | relative difference |\n|---|---|")
    count = crop.shape[-1]
    distance = torch.minimum(torch.arange(count), torch.arange(count).flip(0))
    for low, high in RINGS:
        ring = (distance >= low) & (distance < high)
        if ring.any():
            difference = (whole - crop)[..., ring].norm() / crop_[..., ring].norm()
            print(f"| {low if high == low + 1 else f'{low} to {high - 1}'} | {float(difference):.1%} |")
    print(f"| all | {float((whole - crop).norm() / crop_.norm()):.1%} |")


if __name__ == "__main__":
    cli.main(command, __doc__)
