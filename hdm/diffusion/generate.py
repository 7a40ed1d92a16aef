"""From captions to images: the report's "Inference" section in one class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hdm import rng
from hdm.config.axes import AXES, GUIDANCE, OBJECTIVE, SAMPLER
from hdm.config.errors import ConfigError
from hdm.config.schema import Precision, RunConfig
from hdm.diffusion.batching import images_per_pass, passes, whole_passes
from hdm.diffusion.guidance import Weak
from hdm.model.backbone import Backbone, Condition, full_view

_DECODE = 16  # images per decoder pass: a decoder's activations are hundreds of times larger than its latents


class Noise(Enum):
    """Whether the initial noise keeps its place in the frame, or goes with what is seen when the camera is shifted."""

    still = "still"
    moved = "moved"


@dataclass(kw_only=True, slots=True, frozen=True)
class Camera:
    """Where one looks, in units of the position map: p' = (p + shift) / zoom (spec 1.4).

    `x` > 0 moves the camera to the right, `y` > 0 down, `zoom` > 1 goes closer. The report moves the map alone (noise=still). With
    noise=moved the initial noise, which lays the composition out, goes along by as many whole latent pixels, as a window into an
    endless field.
    """

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    noise: Noise = Noise.still

    def __post_init__(self) -> None:
        if not (self.zoom > 0 and all(map(math.isfinite, (self.x, self.y, self.zoom)))):
            raise ConfigError(
                f"camera.x={self.x} camera.y={self.y} camera.zoom={self.zoom}: must be finite, and zoom above 0; 1 is no zoom"
            )

    def move(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N 2"]:
        """The position map (y, x) as this camera sees it."""
        return (position + position.new_tensor([self.y, self.x])) / self.zoom

    def pixels(self, unit: Float[Tensor, "B 2"]) -> list[tuple[int, int]]:
        """By how many latent pixels, down and right, the noise of each image is moved; `unit` is what 1 of the map is in them."""
        if self.noise is Noise.still:
            return [(0, 0)] * len(unit)
        return [(round(self.y * down), round(self.x * right)) for down, right in unit.tolist()]


@dataclass(kw_only=True, slots=True)
class Network:
    """A trained network, in eval mode, and the run that trained it."""

    model: Backbone
    run: RunConfig

    @property
    def predictor(self) -> Backbone:
        """The network as one that predicts velocities."""
        predictor: Backbone = OBJECTIVE.build(self.run.objective).as_velocity(self.model)
        return predictor


class Generator:
    """Draws images with one model. An image is a function of (seed, index, caption, size): to rounding whatever else is drawn, and
    to the bit for the same captions in the same order, whatever `sampling.batch_size` (hdm/diffusion/batching.py).

    `weak` is the network that guidance=autoguidance steers away from; it is on the device already. Raises ConfigError when it does
    not see the same latents and text states.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        run: RunConfig,
        text_encoder: Any,
        autoencoder: Any,
        device: torch.device | str,
        weak: Network | None = None,
    ) -> None:
        self.model, self.run, self.weak = model, run, weak
        if weak is not None:
            check_weak(run, weak.run)
        self.text_encoder, self.autoencoder = text_encoder, autoencoder
        self.device = torch.device(device)
        self.sampler, self.guidance = SAMPLER.build(run.sampler), GUIDANCE.build(run.guidance)
        self.predictor = Network(model=model, run=run).predictor

    @torch.no_grad()
    def images(
        self,
        captions: Sequence[str],
        *,
        size: tuple[int, int],
        seed: int,
        indices: Sequence[int] | None = None,
        camera: Camera = Camera(),
        views: Float[Tensor, "B 6"] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """One image of `size` (H, W) pixels in [-1, 1] for each caption, on the CPU.

        `indices` key the noise, at the start and in the steps of a stochastic sampler; 0 … B-1 when left out. `views` draws the
        given crop of each image instead of the whole of it.
        `on_step` is told, after each step of the sampler, how many images took it.
        Raises ConfigError for a size that patches do not tile.
        """
        grid = self.token_grid(size)
        indices = range(len(captions)) if indices is None else indices
        views = full_view(*size, batch=len(captions)) if views is None else views.cpu()
        was_training = self.model.training
        self.model.eval()
        try:
            images: list[Tensor] = []
            per_pass = images_per_pass(grid, self.device)
            held = whole_passes(self.run.sampling.batch_size, per_pass)
            for start in range(0, len(captions), held):
                drawn: list[Tensor] = []
                for rows in passes(range(start, min(start + held, len(captions))), per_pass):
                    batch = self._batch(captions[rows], views[rows], grid, camera)
                    places = [(key, *offset) for key, offset in zip(indices[rows], camera.pixels(self.unit(views[rows], grid)))]
                    latents = self._latents(batch, places=places, grid=grid, seed=seed, on_step=on_step)
                    drawn += [self._decode(part) for part in torch.split(latents, _DECODE)]
                images += [part.cpu() for part in drawn]  # only here is the device waited for
        finally:
            self.model.train(was_training)
        return torch.cat(images)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image of `size` (H, W) pixels."""
        patch, weak_patch = self.run.model.patch, self.weak.run.model.patch if self.weak else 1
        side = self.run.autoencoder.factor * math.lcm(patch, weak_patch)
        if any(pixels < 1 or pixels % side for pixels in size):
            nearest = "x".join(str(max(1, round(pixels / side)) * side) for pixels in size)
            both = "" if patch % weak_patch == 0 else f", {patch} and guidance.ckpt's {weak_patch}"
            raise ConfigError(
                f"size={size[0]}x{size[1]}: height and width must be multiples of {side} (autoencoder.factor x model.patch{both});"
                f" nearest: {nearest}"
            )
        return size[0] // (self.run.autoencoder.factor * patch), size[1] // (self.run.autoencoder.factor * patch)

    def unit(self, views: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B 2"]:
        """How many latent pixels, down and right, 1 of the position map is; 0 where the grid has a single row or column."""
        rows, columns = grid
        position = self.model.position_map(views.to(self.device), grid).double().cpu()
        span = (position[:, -1] - position[:, 0]) / position.new_tensor([max(rows - 1, 1), max(columns - 1, 1)])
        return torch.where(span > 0, self.run.model.patch / span, 0.0)

    def _batch(
        self, captions: Sequence[str], views: Float[Tensor, "B 6"], grid: tuple[int, int], camera: Camera
    ) -> tuple[Condition, Condition, Weak | None]:
        """The conditions with the captions and without, and the other network with its own."""
        text, mask = self.text_encoder.encode(captions)
        empty, empty_mask = self.text_encoder.encode([""])
        views = views.to(self.device)
        aspect = torch.log(views[:, 1] / views[:, 0])
        batch = len(captions)

        def conditions(model: Backbone, grid: tuple[int, int]) -> tuple[Condition, Condition]:
            where = {"position": camera.move(model.position_map(views, grid)), "aspect": aspect}
            condition = Condition(text=text, text_mask=mask, **where)
            return condition, Condition(text=empty.expand(batch, -1, -1), text_mask=empty_mask.expand(batch, -1), **where)

        condition, null = conditions(self.model, grid)
        if self.weak is None:
            return condition, null, None
        patch, weak_patch = self.run.model.patch, self.weak.run.model.patch
        other, other_null = conditions(self.weak.model, (grid[0] * patch // weak_patch, grid[1] * patch // weak_patch))
        return condition, null, Weak(model=self.weak.predictor, condition=other, null=other_null)

    def _latents(
        self,
        batch: tuple[Condition, Condition, Weak | None],
        *,
        places: Sequence[tuple[int, int, int]],
        grid: tuple[int, int],
        seed: int,
        on_step: Callable[[int], None] | None,
    ) -> Float[Tensor, "B C h w"]:
        condition, null, weak = batch
        patch, sampler = self.run.model.patch, self.sampler.at(grid[0] * grid[1])
        guidance = self.guidance.along(sampler.times, weak=weak)
        shape = (self.run.autoencoder.channels, grid[0] * patch, grid[1] * patch)
        keys = [key for key, _, _ in places]
        noise = torch.from_numpy(field(seed, "sample/noise", places, shape)).to(self.device)
        route_noise = torch.from_numpy(rng.uniform(seed, "sample/route", keys, (grid[0] * grid[1],))).to(self.device)
        low = self.run.train.precision is Precision.bf16

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
                v: Tensor = guidance.velocity(self.predictor, x, t, condition, null, route_noise=route_noise)
            if on_step is not None:
                on_step(x.shape[0])
            return v

        def fresh(step: int) -> Tensor:
            return torch.from_numpy(field(seed, f"sample/step/{step}", places, shape)).to(self.device)

        latents: Tensor = sampler.sample(velocity, noise, fresh=fresh)
        return latents

    def _decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        pixels: Tensor = self.autoencoder.decode(latents)
        return pixels.float().clamp(-1.0, 1.0)


def field(seed: int, purpose: str, places: Sequence[tuple[int, int, int]], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard normal (B, C, H, W): of each image (key, down, right) the window that begins there in its endless field of noise.

    Counter-based tiles of the window's size make up the field, so windows that overlap agree, and the one at (0, 0) is the first.
    """
    _, height, width = shape

    def tile(key: int, row: int, column: int) -> NDArray[np.float32]:
        return np.asarray(rng.normal(seed, f"{purpose}/{row},{column}" if row or column else purpose, [key], shape)[0])

    windows = []
    for key, down, right in places:
        (row, top), (column, left) = divmod(down, height), divmod(right, width)
        rows = [
            np.concatenate([tile(key, r, c) for c in range(column, column + 1 + (left > 0))], axis=2)
            for r in range(row, row + 1 + (top > 0))
        ]
        windows.append(np.concatenate(rows, axis=1)[:, top : top + height, left : left + width])
    return np.stack(windows)


def check_weak(run: RunConfig, weak: RunConfig) -> None:
    """Raise ConfigError unless the network of guidance.ckpt sees the latents and the text states of this run."""
    for axis, fields in (("autoencoder", ("channels", "factor", "path")), ("text_encoder", ("width", "path"))):
        own, other = getattr(run, axis), getattr(weak, axis)
        pairs: dict[str, tuple[Any, Any]] = {axis: (AXES[axis].of(own).name, AXES[axis].of(other).name)}
        pairs |= {f"{axis}.{field}": (getattr(own, field, None), getattr(other, field, None)) for field in fields}
        for key, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise ConfigError(
                    f"guidance.ckpt={run.guidance.ckpt}: its {key} is {theirs}, this run's {mine}; both networks must see the same"
                    f" {'latents' if axis == 'autoencoder' else 'text states'}, name a run with {key}={mine}"
                )
