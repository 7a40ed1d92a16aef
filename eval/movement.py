"""Does the picture move as the camera does? Slopes of the measured displacement on what was asked: 1 as asked, 0 not at all.

Each shift of the position map is measured in four ways (`camera/x`, and likewise `y`):

* `x`: the map moves and the noise stays, which is the report's camera;
* `x_moved`: the noise goes along (`camera.noise=moved`);
* `x_control`: the noise alone moves. A network that ignored its map would follow it just as well, by being equivariant;
* `x_mean`: the map moves, and the mean pictures are registered, which depend on caption and map alone.

`x_loss` is the rise of the validation loss when the maps of the held-out crops are shifted, the mean over the shifts: what a right
map is worth.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eval import registration
from eval.metrics import Subject, prepare
from eval.samples import GROUP, open_split
from eval.sampling import Engine, Group
from hdm.config.amend import amend
from hdm.config.axes import OBJECTIVE
from hdm.diffusion.generate import Camera, Noise
from hdm.model.backbone import full_view
from hdm.train.examples import Examples
from hdm.train.validation import Validation

if TYPE_CHECKING:
    from eval.camera import Request

_NEAR = 1.5  # pixels
_TURN = 2**20  # keys of noise between two draws of the same captions

Images = UInt8[Tensor, "n 3 H W"]


class OnlyNoise(Camera):
    """The noise moves and the map stays: the control."""

    def move(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N 2"]:  # noqa: D102
        return position


ARMS: dict[str, Callable[[float, float], Camera]] = {
    "": lambda x, y: Camera(x=x, y=y),
    "_moved": lambda x, y: Camera(x=x, y=y, noise=Noise.moved),
    "_control": lambda x, y: OnlyNoise(x=x, y=y, noise=Noise.moved),
}


class Study:
    """Draws one checkpoint in many ways, with the same captions and noise."""

    def __init__(self, subject: Subject, request: "Request") -> None:
        self.subject, self.request = subject, request
        drawn = prepare(subject)
        self.device, self.captions = drawn.device, drawn.real.captions[: max(request.shown, request.measured)]
        self.engine = Engine(subject.loaded.model, subject.run, device=self.device)
        side = subject.run.crop.size
        self.size = (side, side)

    def draw(
        self,
        count: int,
        *,
        camera: Camera | None = None,
        size: tuple[int, int] | None = None,
        view: Float[Tensor, " 6"] | None = None,
        engine: Engine | None = None,
        turn: int = 0,
    ) -> Images:
        """uint8 (count, 3, H, W) of the first captions; whole images where no `view` is given, other noise on each `turn`."""
        size = size or self.size
        parts = []
        for start in range(0, min(count, len(self.captions)), GROUP):
            captions = self.captions[start : min(count, start + GROUP)]
            views = full_view(*size, batch=len(captions)) if view is None else view.expand(len(captions), 6)
            keys = [turn * _TURN + number for number in range(start, start + len(captions))]
            group = Group(captions=captions, views=views, keys=keys, size=size)
            parts.append((engine or self.engine).draw(group, camera=camera))
        return torch.cat(parts)

    def other(self, *overrides: str) -> Engine:
        """An engine for the same network, sampled differently; encoders are shared."""
        run = amend(self.subject.run, overrides)
        encoders = {"text_encoder": self.engine.text_encoder, "autoencoder": self.engine.autoencoder}
        return Engine(self.subject.loaded.model, run, device=self.device, **encoders)

    def view(self, axis: str) -> Float[Tensor, " 6"]:
        """The middle square of an image that is `frame` times as long along `axis` as across."""
        side = float(self.size[0])
        long, edge = side * self.request.frame, side * (self.request.frame - 1) / 2
        return torch.tensor([side, long, 0.0, edge, side, side] if axis == "x" else [long, side, edge, 0.0, side, side])

    def pixels(self, axis: str) -> float:
        """How many pixels along `axis` one unit of the position map is."""
        generator = self.engine.generator
        unit = generator.unit(self.view(axis)[None], generator.token_grid(self.size))[0]
        return float(unit[1 if axis == "x" else 0] * self.subject.run.autoencoder.factor)


@dataclass(kw_only=True, slots=True)
class Movements:
    """Measures by name, a row for each setting, and the images of each study by label."""

    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sheets: dict[str, list[tuple[str, Images]]] = field(default_factory=dict)

    def slope(self, name: str, asked: Sequence[float], found: Sequence[float]) -> None:
        """Of the line through the origin that fits best."""
        if np.dot(asked, asked) > 0:
            self.values[f"camera/{name}"] = float(np.dot(asked, found) / np.dot(asked, asked))


def passes(request: "Request") -> int:
    """How many times `movements` advances."""
    return 2 * (2 + (len(ARMS) + 2) * len(request.shifts)) + 1 + len(request.zooms)


def movements(study: Study, advance: Callable[[float], None]) -> Movements:
    """All that is measured."""
    found = Movements()
    for axis in ("x", "y"):
        _shifts(study, found, axis, advance)
        _means(study, found, axis, advance)
    _zooms(study, found, advance)
    _losses(study, found, advance)
    return found


def _along(axis: str, shift: float) -> tuple[float, float]:
    """(x, y)."""
    return (shift, 0.0) if axis == "x" else (0.0, shift)


def _shifts(study: Study, found: Movements, axis: str, advance: Callable[[float], None]) -> None:
    request, view, column = study.request, study.view(axis), 1 if axis == "x" else 0
    count = max(request.measured, request.shown)
    still = study.draw(count, view=view)
    advance(1)
    asked = [-shift * study.pixels(axis) for shift in request.shifts]  # the camera goes right, the picture left
    for arm, camera in ARMS.items():
        medians, near = [], []
        sheet = [("as it is", still)]
        for shift, wanted in zip(request.shifts, asked):
            images = study.draw(count, view=view, camera=camera(*_along(axis, shift)))
            advance(1)
            pair = still[: request.measured], images[: request.measured]
            each, common = registration.displacement(*pair)[:, column], registration.common_displacement(*pair)[column]
            label = f"camera.{axis}={shift:g}{arm.replace('_', ' ')}"
            found.rows.append({"setting": label, "asked": wanted, "median": float(np.median(each)), "common": float(common)})
            medians.append(float(np.median(each)))
            near.append(float((np.abs(each - wanted) <= _NEAR).mean()))
            sheet.append((label, images))
        found.slope(f"{axis}{arm}", asked, medians)
        found.values[f"camera/{axis}{arm}_within"] = float(np.mean(near))
        if arm != "_control":
            found.sheets[f"{axis}{arm}"] = sheet


def _means(study: Study, found: Movements, axis: str, advance: Callable[[float], None]) -> None:
    """Registers mean pictures, each over noises of its own: noise that two of them shared would seem to stand still.

    From pure noise x at t=1 nothing is known of the picture but its caption and place, so the best velocity there is x minus the
    mean of all such pictures, and a single step of it ends in that mean.
    """
    request, view, column = study.request, study.view(axis), 1 if axis == "x" else 0
    engine = study.other("sampler=euler", "sampler.steps=1", "guidance=none")

    def mean(number: int, camera: Camera | None) -> Images:
        turns = range(1 + number * request.noises, 1 + (number + 1) * request.noises)
        drawn = [study.draw(request.measured, view=view, camera=camera, turn=turn, engine=engine).float() for turn in turns]
        advance(1)
        return torch.stack(drawn).mean(dim=0).round().to(torch.uint8)

    still = mean(0, None)
    sheet = [("mean as it is", still)]
    asked, commons = [], []
    for number, shift in enumerate(request.shifts):
        images = mean(1 + number, ARMS[""](*_along(axis, shift)))
        wanted = -shift * study.pixels(axis)
        each = registration.displacement(still, images)[:, column]
        common = float(registration.common_displacement(still, images)[column])
        label = f"camera.{axis}={shift:g} mean"
        found.rows.append({"setting": label, "asked": wanted, "median": float(np.median(each)), "common": common})
        asked.append(wanted)
        commons.append(common)
        sheet.append((label, images))
    found.slope(f"{axis}_mean", asked, commons)
    found.sheets[f"{axis}_mean"] = sheet


def _zooms(study: Study, found: Movements, advance: Callable[[float], None]) -> None:
    request = study.request
    count = max(request.measured, request.shown)
    still = study.draw(count)
    advance(1)
    found.sheets["zoom"] = [("as it is", still)]
    logs = []
    for factor in request.zooms:
        images = study.draw(count, camera=Camera(zoom=factor))
        advance(1)
        median = float(np.median(registration.zoom(still[: request.measured], images[: request.measured])))
        found.rows.append({"setting": f"camera.zoom={factor:g}", "asked": factor, "median": median})
        logs.append(float(np.log(median)))
        found.sheets["zoom"].append((f"camera.zoom={factor:g}", images))
    found.slope("zoom", [float(np.log(factor)) for factor in request.zooms], logs)


def _losses(study: Study, found: Movements, advance: Callable[[float], None]) -> None:
    """How much the validation loss rises when the maps of the held-out crops are moved."""
    subject, run, shifts = study.subject, study.subject.run, study.request.shifts
    run = dataclasses.replace(run, validation=dataclasses.replace(run.validation, samples=study.request.measured))
    validation = Validation(run, open_split(run, "val"), Examples(run, study.device), OBJECTIVE.build(run.objective))
    model = subject.loaded.model
    right = float(validation.losses(model).mean())
    for axis in ("x", "y"):
        rises = []
        for shift in shifts:
            rises.append(float(validation.losses(model, move=ARMS[""](*_along(axis, shift)).move).mean()) - right)
            found.rows.append({"setting": f"real crops, map moved by {axis}={shift:g}", "loss": rises[-1]})
            advance(1)
        found.values[f"camera/{axis}_loss"] = float(np.mean(rises))
