"""The camera and inference study: does the picture move as asked, and what do aspect ratio, steps and guidance rates change?

usage: python -m eval.camera ckpt=RUN_OR_CHECKPOINT [weights=ema|raw|ema_decay] [n=8] [OPTION ...] [KEY=VALUE ...]

  python -m eval.camera ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.camera ckpt=runs/NAME shifts=[-0.3,0.3] zooms=[0.8,1.25] steps=[8,32] sizes=[256x256,192x320] rates=[0.25,0.5]

One labelled sheet for each study goes to eval/camera-…/ in the run folder: rows are held-out captions, columns settings, the
noise is the same in a row. The displacement between the sheets' columns is measured by phase correlation and compared with what
was asked: `camera/x`, `camera/y` and `camera/zoom` are the slopes of measured on asked (1: as asked, 0: not at all), `…_within`
the fraction of images within a pixel and a half of it.

n=8            captions
measured=32    images for the measures
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
    from eval.sampling import Engine

_LISTS = {"shifts": "-0.25,-0.125,0.125,0.25", "zooms": "0.8,1.25", "steps": "4,8,16,32", "rates": "0.25,0.5,0.75"}
_NEAR = 1.5  # pixels
_PER_CELL = 24  # characters of a label


@dataclass(kw_only=True, slots=True)
class Request:
    """What is asked for; `sizes` is (H, W) in pixels."""

    shown: int
    measured: int
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
        shifts=numbers["shifts"],
        zooms=numbers["zooms"],
        sizes=[_size(text) for text in sizes.split(",") if text],
        steps=[int(value) for value in numbers["steps"]],
        rates=numbers["rates"],
    )
    if any(zoom <= 0 for zoom in request.zooms):
        raise HdmError(f"zooms={request.zooms}: must be above 0; 1 is no zoom")
    if any(not 0 < rate < 1 for rate in request.rates):
        raise HdmError(f"rates={request.rates}: must be between 0 and 1, both left out")
    return request


class Study:
    """Draws one checkpoint in many ways, with the same captions and noise."""

    def __init__(self, subject: "Subject", request: Request) -> None:
        from eval.metrics import prepare
        from eval.sampling import Engine

        self.subject, self.request = subject, request
        drawn = prepare(subject)
        self.device, self.captions = drawn.device, drawn.real.captions[: max(request.shown, request.measured)]
        self.engine = Engine(subject.loaded.model, subject.run, device=self.device)
        side = subject.run.crop.size
        self.size = (side, side)

    def draw(self, count: int, *, camera: Any = None, size: tuple[int, int] | None = None, engine: "Engine | None" = None) -> Any:
        """uint8 (count, 3, H, W) of the first captions."""
        import torch

        from eval.samples import GROUP
        from eval.sampling import Group
        from hdm.model.backbone import full_view

        size = size or self.size
        parts = []
        for start in range(0, min(count, len(self.captions)), GROUP):
            captions = self.captions[start : min(count, start + GROUP)]
            keys = list(range(start, start + len(captions)))
            group = Group(captions=captions, views=full_view(*size, batch=len(captions)), keys=keys, size=size)
            parts.append((engine or self.engine).draw(group, camera=camera))
        return torch.cat(parts)

    def other(self, *overrides: str) -> "Engine":
        """An engine for the same network, sampled differently; encoders are shared."""
        from eval.sampling import Engine
        from hdm.config.amend import amend

        run = amend(self.subject.run, overrides)
        encoders = {"text_encoder": self.engine.text_encoder, "autoencoder": self.engine.autoencoder}
        return Engine(self.subject.loaded.model, run, device=self.device, **encoders)

    def pixels_per_unit(self) -> tuple[float, float]:
        """How many pixels down and right one unit of the position map is."""
        from hdm.model.backbone import full_view

        rows, columns = self.engine.generator.token_grid(self.size)
        position = self.engine.generator.model.position_map(full_view(*self.size, batch=1).to(self.device), (rows, columns))[0]
        span = position[-1] - position[0]
        height, width = self.size
        return height * (rows - 1) / rows / float(span[0]), width * (columns - 1) / columns / float(span[1])


def movements(study: Study, advance: Any) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[tuple[str, Any]]]]:
    """Slopes and fractions by name, a row for each setting, and the images of each study by label."""
    import numpy as np

    from eval import registration
    from hdm.diffusion.generate import Camera

    request = study.request
    count = max(request.measured, request.shown)
    still = study.draw(count)
    advance(1)
    down, right = study.pixels_per_unit()
    rows: list[dict[str, Any]] = []
    values: dict[str, float] = {}
    sheets: dict[str, list[tuple[str, Any]]] = {}
    for axis, unit, column in (("x", right, 1), ("y", down, 0)):
        asked, found, near = [], [], []
        sheets[axis] = [("as it is", still)]
        for shift in request.shifts:
            images = study.draw(count, camera=Camera(**{axis: shift}))
            advance(1)
            each = registration.displacement(still[: request.measured], images[: request.measured])[:, column]
            common = registration.common_displacement(still[: request.measured], images[: request.measured])[column]
            wanted = -shift * unit  # the camera goes right, the picture left
            rows.append(
                {"setting": f"camera.{axis}={shift:g}", "asked": wanted, "median": float(np.median(each)), "common": common}
            )
            asked.append(wanted)
            found.append(float(np.median(each)))
            near.append(float((np.abs(each - wanted) <= _NEAR).mean()))
            sheets[axis].append((f"camera.{axis}={shift:g}", images))
        values[f"camera/{axis}"] = float(np.dot(asked, found) / np.dot(asked, asked))
        values[f"camera/{axis}_within"] = float(np.mean(near))
    sheets["zoom"] = [("as it is", still)]
    asked, found = [], []
    for factor in request.zooms:
        images = study.draw(count, camera=Camera(zoom=factor))
        advance(1)
        each = registration.zoom(still[: request.measured], images[: request.measured])
        rows.append({"setting": f"camera.zoom={factor:g}", "asked": factor, "median": float(np.median(each)), "common": None})
        asked.append(np.log(factor))
        found.append(float(np.log(np.median(each))))
        sheets["zoom"].append((f"camera.zoom={factor:g}", images))
    if asked:
        values["camera/zoom"] = float(np.dot(asked, found) / np.dot(asked, asked))
    return values, rows, sheets


def settings(study: Study, advance: Any) -> dict[str, list[tuple[str, Any]]]:
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
    tracked(found, lambda recorder: conduct(found, request, recorder))


def conduct(subject: "Subject", request: Request, recorder: Any) -> dict[str, float]:
    """Draw, measure, and write everything into the run folder; returns the measures."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from eval import protocol
    from hdm.files import write_json

    study = Study(subject, request)
    run, loaded = subject.run, subject.loaded
    passes = 1 + 2 * len(request.shifts) + len(request.zooms) + len(request.sizes or _ratios(study)) + len(request.steps)
    with cli.progress("camera study", passes + len(request.rates), "settings") as advance:
        values, rows, sheets = movements(study, advance)
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
    table = Table(title=f"{loaded.folder.name}: displacement, protocol {digest}", title_justify="left")
    for column in ("setting", "asked", "median", "of all together"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        common = "" if row["common"] is None else f"{row['common']:.2f}"
        table.add_row(row["setting"], f"{row['asked']:.2f}", f"{row['median']:.2f}", common)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("  ".join(f"{name} {value:.3f}" for name, value in values.items()), highlight=False)
    return values


def _sheet(study: Study, columns: list[tuple[str, Any]], path: Path) -> None:
    from hdm.pictures import sheet

    count = min(study.request.shown, len(study.captions))
    images = [images[i] for i in range(count) for _, images in columns]
    labels = [
        f"{label} {study.captions[i][:_PER_CELL] if k == 0 else ''}" for i in range(count) for k, (label, _) in enumerate(columns)
    ]
    sheet(images, labels, columns=len(columns)).save(path)


def _ratios(study: Study) -> list[tuple[int, int]]:
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
