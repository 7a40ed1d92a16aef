"""From a batch of pixels and captions to what the objective is given: latents, noise, timesteps, conditions and routes.

The frozen networks run here, without gradients, or what they give is read from a cache. Draws are keyed by the sample's number in
the run, never by its place in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hdm import rng
from hdm.conditioning.cache import CachedLatents, CachedStates, wanted
from hdm.config.axes import AUTOENCODER, TEXT_ENCODER, TIMESTEP
from hdm.config.schema import RunConfig
from hdm.data.loader import Batch
from hdm.model.backbone import Backbone, Condition, Route


@dataclass(kw_only=True, slots=True)
class Example:
    """B training examples on the device, as `Objective.loss` takes them."""

    latents: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    timestep: Float[Tensor, " B"]
    condition: Condition
    route: Route


class Examples:
    """Makes examples of batches, with the frozen encoders of a run."""

    def __init__(self, run: RunConfig, device: torch.device, *, data: str | None = None) -> None:
        """`data` is the digest of the training data; without it no cache is read. Raises DataError for one that does not fit."""
        self.seed, self.device = run.seed, device
        cache = Path(run.cache)
        self.text_encoder = TEXT_ENCODER.build(run.text_encoder, cache=cache, device=device)
        self.autoencoder = AUTOENCODER.build(run.autoencoder, cache=cache, device=device)
        self.cached_latents = self.cached_states = None
        if data is not None and wanted(run.autoencoder):
            self.cached_latents = CachedLatents(run, self.autoencoder, data=data)
        if data is not None and wanted(run.text_encoder):
            self.cached_states = CachedStates(run, self.text_encoder, data=data)
        self.timestep, self.batch_size = TIMESTEP.build(run.timestep), run.train.batch_size
        self.channels, self.factor, self.patch = run.autoencoder.channels, run.autoencoder.factor, run.model.patch

    @torch.no_grad()
    def draw(self, batch: Batch, model: Backbone) -> Example:
        """The training examples of `batch`."""
        rows, columns = self.grid(batch.pixels)
        shape = self.latent_shape(batch.pixels)
        return Example(
            latents=self._drawn_latents(batch, self.to_device(rng.normal(self.seed, "posterior", batch.index, shape))),
            noise=self.to_device(rng.normal(self.seed, "noise", batch.index, shape)),
            timestep=self.timestep.from_uniform(
                self.to_device(self.timestep.quantiles(self.seed, batch.index, batch_size=self.batch_size)), tokens=rows * columns
            ),
            condition=self._condition((self.cached_states or self.text_encoder).encode(batch.captions), batch, model),
            route=Route(noise=self.to_device(rng.uniform(self.seed, "route", batch.index, (rows * columns,)))),
        )

    @torch.no_grad()
    def latents(self, pixels: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"] | None) -> Float[Tensor, "B C h w"]:
        """Latents of `pixels`: a posterior sample with `noise`, the mode without."""
        latents: Tensor = self.autoencoder.encode(pixels.to(self.device, non_blocking=True), noise)
        return latents.float()

    def _drawn_latents(self, batch: Batch, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        if self.cached_latents is None:
            return self.latents(batch.pixels, noise)
        return self.cached_latents.encode(batch.pixels, noise, batch.keys)

    @torch.no_grad()
    def condition(self, batch: Batch, captions: Sequence[str], model: Backbone) -> Condition:
        """The condition that `captions` make with the views of `batch`."""
        return self._condition(self.text_encoder.encode(captions), batch, model)

    def _condition(self, states: tuple[Tensor, Tensor], batch: Batch, model: Backbone) -> Condition:
        text, mask = states
        view = batch.view.to(self.device, non_blocking=True)
        position = model.position_map(view, self.grid(batch.pixels))
        return Condition(text=text, text_mask=mask, position=position, aspect=batch.aspect.to(self.device, non_blocking=True))

    def latent_shape(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of `pixels`."""
        return self.channels, pixels.shape[2] // self.factor, pixels.shape[3] // self.factor

    def grid(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        _, height, width = self.latent_shape(pixels)
        return height // self.patch, width // self.patch

    def to_device(self, array: NDArray[np.float32]) -> Tensor:
        """A host array on the device, without waiting for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
