"""The camera and inference study: does the picture move as asked, and what do aspect ratio, steps and guidance rates change?

usage: python -m eval.camera ckpt=RUN_OR_CHECKPOINT [weights=ema|raw|ema_decay] [n=8] [OPTION ...] [KEY=VALUE ...]

  python -m eval.camera ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.camera ckpt=runs/NAME shifts=[-0.3,0.3] zooms=[0.8,1.25] steps=[8,32] sizes=[256x256,192x320] rates=[0.25,0.5]

One labelled sheet for each study goes to eval/camera-…/ in the run folder: rows are held-out captions, columns settings, the
noise is the same in a row. The displacement between the sheets' columns is measured by phase correlation and compared with what
was asked: `camera/x`, `camera/y` and `camera/zoom` are the slopes of measured on asked (1: as asked, 0: not at all), `…_within`
the fraction of images within a pixel and a half of it. Shifts are measured in four ways:

  x            the position map moves and the noise stays, as in the report
  x_moved      the noise goes along (camera.noise=moved)
  x_control    the noise alone moves, the map stays: what of x_moved is no merit of the map
  x_mean       the map moves; registered is the mean picture, the network's one-step guess from pure noise, over independent noises
  x_loss       how much the validation loss rises when the maps of real crops are moved, the mean over the shifts

n=8            captions
measured=32    images for the measures
noises=8       noises behind each mean picture
frame=1        the pictures of shifts are the middle square of whole images so many times as long: 1 is the whole of a square one;
               at 1.5 a shift stays within what training cut its squares from
shifts=[-0.25,-0.125,0.125,0.25]    camera.x and camera.y, in units of the position map (1 is the side of a square)
zooms=[0.8,1.25]                    camera.zoom
sizes=[HxW,...]                     aspect ratios of about the training area, by default
steps=[4,8,16,32]                   sampler.steps
rates=[0.25,0.5,0.75]               guidance=routed, guidance.rate_uncond; left out for networks trained without routing
Also: sampler.*, guidance.*, eval.seed, device, datasets, cache, track.* (docs/evaluation.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.errors import HdmError

if TYPE_CHECKING:
    from eval.metrics import Subject
    from eval.movement import Study

_LISTS = {"shifts": "-0.25,-0.125,0.125,0.25", "zooms": "0.8,1.25", "steps": "4,8,16,32", "rates": "0.25,0.5,0.75"}
_PER_CELL = 24  # characters of a label


@dataclass(kw_only=True, slots=True)
class Request:
    """What is asked for; `sizes` is (H, W) in pixels, `frame` how long the whole image is that the shifts look into."""

    shown: int
    measured: int
    noises: int
    frame: float
    shifts: list[float]
    zooms: list[float]
    sizes: list[tuple[int, int]]
    steps: list[int]
    rates: list[float]


def parse(arguments: list[str]) -> Request:
    """Take the study's own options from the command line. Raises HdmError in one line."""
    numbers = {key: _numbers(key, cli.take_option(arguments, key) or default) for key, default in _LISTS.items()}
    sizes = (cli.take_option(arguments, "sizes") or "").strip("[]")
    request = Request(
        shown=_whole("n", cli.take_option(arguments, "n") or "8"),
        measured=_whole("measured", cli.take_option(arguments, "measured") or "32"),
        noises=_whole("noises", cli.take_option(arguments, "noises") or "8"),
        frame=(_numbers("frame", cli.take_option(arguments, "frame") or "1") or [0.0])[0],
        shifts=numbers["shifts"],
        zooms=numbers["zooms"],
        sizes=[_size(text) for text in sizes.split(",") if text],
        steps=[int(value) for value in numbers["steps"]],
        rates=numbers["rates"],
    )
    if request.frame < 1:
        raise HdmError(f"frame={request.frame:g}: must be 1 or more; the whole image is so many times as long as the picture")
    if any(zoom <= 0 for zoom in request.zooms):
        raise HdmError(f"zooms={request.zooms}: must be above 0; 1 is no zoom")
    if any(not 0 < rate < 1 for rate in request.rates):
        raise HdmError(f"rates={request.rates}: must be between 0 and 1, both left out")
    return request


def settings(study: "Study", advance: Any) -> dict[str, list[tuple[str, Any]]]:
    """The images of the studies that are looked at, not measured: aspect ratios, steps, rates."""
    from hdm.config.errors import ConfigError

    request, count = study.request, study.request.shown
    sheets: dict[str, list[tuple[str, Any]]] = {"aspect": [], "steps": [], "rates": []}
    for height, width in request.sizes or _ratios(study):
        sheets["aspect"].append((f"{height}x{width}", study.draw(count, size=(height, width))))
        advance(1)
    for steps in request.steps:
        sheets["steps"].append((f"sampler.steps={steps}", study.draw(count, engine=study.other(f"sampler.steps={steps}"))))
        advance(1)
    for rate in request.rates:
        try:
            engine = study.other("guidance=routed", f"guidance.rate_uncond={rate}")
        except ConfigError:
            break  # a network without a route
        sheets["rates"].append((f"rate_uncond={rate:g}", study.draw(count, engine=engine)))
        advance(1)
    return {name: columns for name, columns in sheets.items() if columns}


def command(arguments: list[str]) -> None:
    """`python -m eval.camera`."""
    request = parse(arguments)
    from eval.command import subject, tracked

    found = subject("camera", arguments)
    from eval.sampling import rank  # imports torch, which a wrong word should not wait for

    if rank() > 0:
        return
    tracked(found, lambda recorder: conduct(found, request, recorder))


def conduct(subject: "Subject", request: Request, recorder: Any) -> dict[str, float]:
    """Draw, measure, and write everything into the run folder; returns the measures."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from eval import protocol
    from eval.movement import Study, movements, passes
    from eval.threads import one_thread_each
    from hdm.files import write_json

    study = Study(subject, request)
    run, loaded = subject.run, subject.loaded
    looked_at = len(request.sizes or _ratios(study)) + len(request.steps) + len(request.rates)
    with cli.progress("camera study", passes(request) + looked_at, "settings") as advance, one_thread_each():
        found = movements(study, advance)
        values, rows, sheets = found.values, found.rows, found.sheets
        sheets |= settings(study, advance)
    facts = protocol.sampling_protocol(
        run,
        weights=loaded.weights,
        samples=request.measured,
        size=study.size,
        prompts=protocol.text_digest(study.captions),
        reference="none",
    )
    facts |= {"metric": "camera", "view": "whole images", "study": dataclasses.asdict(request)}
    digest = protocol.digest(facts)
    folder = loaded.folder / "eval" / f"camera-{digest}-{loaded.samples:09d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in sheets.items():
        path = folder / f"{name}.png"
        _sheet(study, columns, path)
        print(path)
        if recorder is not None:
            recorder.image(f"camera/{name}", path, loaded.samples)
    report = folder / "camera.json"
    write_json(report, {"metrics": values, "settings": rows, "protocol_digest": digest, "protocol": facts})
    if recorder is not None:
        recorder.metrics(values, None)
        recorder.tags({"protocol.camera": digest})
        recorder.artifact(report)
    table = Table(title=f"{loaded.folder.name}: displacement in pixels, protocol {digest}", title_justify="left")
    headings = {"asked": "asked", "median": "median", "common": "of all together", "loss": "rise of the loss"}
    table.add_column("setting")
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{row[key]:.{4 if key == 'loss' else 2}f}" if key in row else "" for key in headings]
        table.add_row(row["setting"], *numbers)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("  ".join(f"{name} {value:.3f}" for name, value in values.items()), highlight=False)
    return values


def _sheet(study: "Study", columns: list[tuple[str, Any]], path: Path) -> None:
    from hdm.pictures import sheet

    count = min(study.request.shown, len(study.captions))
    images = [images[i] for i in range(count) for _, images in columns]
    labels = [
        f"{label} {study.captions[i][:_PER_CELL] if k == 0 else ''}" for i in range(count) for k, (label, _) in enumerate(columns)
    ]
    sheet(images, labels, columns=len(columns)).save(path)


def _ratios(study: "Study") -> list[tuple[int, int]]:
    """Sizes of about the training area, from twice as high as wide to twice as wide as high, in whole patches."""
    import math

    run = study.subject.run
    cell, side = run.autoencoder.factor * run.model.patch, run.crop.size
    found = []
    for ratio in (0.5, 0.75, 1.0, 4 / 3, 2.0):
        height, width = side / math.sqrt(ratio), side * math.sqrt(ratio)
        found.append((max(1, round(height / cell)) * cell, max(1, round(width / cell)) * cell))
    return list(dict.fromkeys(found))


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("[]").split(",") if part.strip()]
    except ValueError:
        raise HdmError(f"{key}={text}: is no list of numbers, such as {key}=[{_LISTS[key]}]") from None


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise HdmError(f"{key}={text}: must be a whole number, 1 or more")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.strip().lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise HdmError(f"sizes={text}: is not of the form HxW, such as sizes=[32x32,24x40]")
    return int(height), int(width)


if __name__ == "__main__":
    cli.main(command, __doc__)
