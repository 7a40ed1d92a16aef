"""Images for prompts, from a run or a checkpoint.

usage: python -m hdm.sample ckpt=RUN_OR_CHECKPOINT prompt="a red car" [prompt=...] [prompts=FILE] [OPTION ...] [KEY=VALUE ...]

  python -m hdm.sample ckpt=runs/openmoji_nano-s0-1f0c77ab prompt="red apple, fruit" n=4
  python -m hdm.sample ckpt=runs/NAME prompts=captions.txt size=32x48 camera.x=0.25 sampler.steps=16 guidance.scale=2
  python -m hdm.sample ckpt=runs/NAME prompt="red apple" guidance=autoguidance guidance.ckpt=runs/SMALLER

prompts=FILE      one prompt a line
n=1               images per prompt
size=HxW          pixels; any aspect ratio; the training size by default
seed=0            noise seed: image i of a call is the same whatever n and the batch size are
camera.x=0 camera.y=0 camera.zoom=1    x > 0 looks to the right, y > 0 down, zoom > 1 goes closer, on the position map
camera.noise=still    still: the noise stays in its place, as in the report; moved: it goes with what is seen
weights=ema       ema | raw | ema_decay | ema:WIDTH, such as ema:0.07, made of snapshots (python -m hdm.ema)
out=FILE.png      the labelled sheet; single images go beside it into FILE/; below samples/ in the run folder by default
Also: sampler.*, guidance.*, sampling.batch_size, device, cache, train.precision (python -m hdm.variants sampler).
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path

from hdm import cli
from hdm.config.amend import amend, check_amendable
from hdm.config.errors import HdmError, suggest
from hdm.config.schema import RunConfig

_OPTIONS = ("ckpt", "prompts", "n", "size", "seed", "camera.x", "camera.y", "camera.zoom", "camera.noise", "weights", "out")


@dataclass(kw_only=True, slots=True)
class Request:
    """What is asked for; `size` is (H, W) in pixels, `camera` (x, y, zoom), `noise` that of the camera."""

    ckpt: str
    prompts: list[str]
    n: int
    size: tuple[int, int] | None
    seed: int
    camera: tuple[float, float, float]
    noise: str
    weights: str
    out: str | None
    overrides: list[str]


def parse(arguments: list[str]) -> Request:
    """Read the command line. A prompt is taken as it is: it may hold commas, quotes and equals signs."""
    prompts = [a.removeprefix("prompt=") for a in arguments if a.startswith("prompt=")]
    rest = [a for a in arguments if not a.startswith("prompt=")]
    values = {name: cli.take_option(rest, name) for name in _OPTIONS}
    ckpt = values["ckpt"]
    if not ckpt:
        raise HdmError(
            'ckpt= is missing; name a run folder or a checkpoint: python -m hdm.sample ckpt=runs/NAME prompt="a red car"'
        )
    if values["prompts"]:
        prompts += prompt_lines(Path(values["prompts"]))
    for text in rest:
        if "=" not in text:
            raise HdmError(f"'{text}' is not of the form key=value; quote a prompt that holds spaces: prompt=\"a red car\"")
        key = text.partition("=")[0]
        known = key.partition(".")[0] in {field.name for field in fields(RunConfig)}  # guidance.weights is no misspelt weights
        if not known and (close := suggest(key, ["prompt", *_OPTIONS])):
            raise HdmError(f"{text}: no such option{close}")
    check_amendable(rest)
    if values["out"] and not values["out"].lower().endswith(".png"):
        raise HdmError(f"out={values['out']}: must end in .png")
    if not prompts:
        raise HdmError('no prompt; add prompt="a red car" or prompts=FILE')
    camera = (_number(values, "camera.x", "0"), _number(values, "camera.y", "0"), _number(values, "camera.zoom", "1"))
    return Request(
        ckpt=ckpt,
        prompts=prompts,
        n=_whole(values, "n", "1", least=1),
        size=_size(values["size"]),
        seed=_whole(values, "seed", "0", least=0),
        camera=camera,
        noise=_noise(values["camera.noise"] or "still"),
        weights=values["weights"] or "ema",
        out=values["out"],
        overrides=rest,
    )


def command(arguments: list[str]) -> None:
    """Draw, save, and say where and how fast."""
    request = parse(arguments)
    import torch

    from hdm.config.axes import AUTOENCODER, TEXT_ENCODER
    from hdm.diffusion.generate import Camera, Generator, Noise
    from hdm.train.checkpoint import load_model
    from hdm.train.loop import pick_device
    from hdm.train.weak import load_weak

    x, y, zoom = request.camera
    camera = Camera(x=x, y=y, zoom=zoom, noise=Noise(request.noise))
    loaded = load_model(request.ckpt, weights=request.weights)
    run = amend(loaded.run, request.overrides)
    device, cache = pick_device(run.device), Path(run.cache)
    weak = load_weak(run, device=device)
    encoders = {
        "text_encoder": TEXT_ENCODER.build(run.text_encoder, cache=cache, device=device),
        "autoencoder": AUTOENCODER.build(run.autoencoder, cache=cache, device=device),
    }
    generator = Generator(loaded.model.to(device), run=run, device=device, weak=weak, **encoders)
    size = request.size or (run.crop.size, run.crop.size)
    generator.token_grid(size)  # refuses a size that does not fit, before anything is shown
    captions = [prompt for prompt in request.prompts for _ in range(request.n)]
    evaluations = generator.sampler.evaluations
    began = time.perf_counter()
    with cli.progress("images", len(captions), "images") as advance:
        images = generator.images(
            captions, size=size, seed=request.seed, camera=camera, on_step=lambda count: advance(count / evaluations)
        )
    seconds = time.perf_counter() - began
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    out = (
        Path(request.out)
        if request.out
        else loaded.folder / "samples" / f"sample-{loaded.samples:09d}-{time.time_ns() // 10**6}.png"
    )
    for path in _save(pixels, captions, request.n, out):
        print(path)
    rate = len(captions) / seconds
    print(f"{len(captions)} images of {size[0]}x{size[1]} in {seconds:.1f} s, {rate:.3g} images/s, {loaded.weights} weights")


def _save(pixels, captions: list[str], n: int, out: Path) -> list[Path]:  # type: ignore[no-untyped-def]
    """Write the single images into a folder beside the sheet, and the sheet; return the paths, the sheet last."""
    from hdm.pictures import sheet, to_image

    folder = out.with_suffix("")
    paths = [folder / f"{i:04d}.png" for i in range(len(pixels))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image, path in zip(pixels, paths):
            to_image(image).save(path)
        sheet(pixels, captions, columns=n if 1 < n <= 16 else None).save(out)
    except (OSError, ValueError) as error:
        raise HdmError(f"out={out}: cannot be written ({error}); name a .png in a folder that you may write to") from None
    return [*paths, out]


def prompt_lines(path: Path) -> list[str]:
    """One prompt a line. Raises HdmError for a file that cannot be read or holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HdmError(f"prompts={path}: cannot be read ({error}); name a text file with one prompt a line") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise HdmError(f"prompts={path}: holds no prompt; write one a line")
    return found


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise HdmError(f"size={text}: is not of the form HxW, height times width in pixels, such as size=32x48")
    return int(height), int(width)


def _whole(values: dict[str, str | None], key: str, default: str, *, least: int) -> int:
    text = values[key] or default
    if not text.isdecimal() or int(text) < least:
        raise HdmError(f"{key}={text}: must be a whole number, {least} or more")
    return int(text)


def _noise(text: str) -> str:
    if text not in ("still", "moved"):
        raise HdmError(f"camera.noise={text}: must be still or moved")
    return text


def _number(values: dict[str, str | None], key: str, default: str) -> float:
    text = values[key] or default
    try:
        return float(text)
    except ValueError:
        raise HdmError(f"{key}={text}: must be a number") from None


if __name__ == "__main__":
    cli.main(command, __doc__)
