"""Validation loss: fixed held-out images, fixed noise, fixed timesteps, nothing routed, whatever the run's seed and its axes.

Numbers of two runs hence differ by their networks alone. Every image is seen at the same timesteps, the midpoint quantiles
(k + 1/2) / T of the report's law, also in a run that trains on another one: at other timesteps an equally good network has another
loss. It is the squared error of the velocity, whatever the objective adds to that in training. The noise is keyed by the image's
number, and how many images go through the network together is no option (hdm/diffusion/batching.py): `validation.batch_size`
changes no bit.

Images are cut to squares, whatever the crop that a run trains on. `validation.whole=true` asks a second question: the same images,
whole, each in its own aspect ratio.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hdm import rng
from hdm.config.axes import TIMESTEP
from hdm.config.schema import Precision, RunConfig
from hdm.data.loader import validation_batches, whole_batches
from hdm.data.shards import Shards
from hdm.diffusion.batching import images_per_pass, passes, whole_passes
from hdm.diffusion.objective import Objective
from hdm.diffusion.timestep import LogitNormalConfig
from hdm.model.backbone import Backbone, Condition
from hdm.train.ema import Averages
from hdm.train.examples import Examples
from hdm.train.parallel import World

BINS = 4
_SEED = 0  # not the run's: all runs are asked the same questions


@dataclass(kw_only=True, slots=True)
class _Images:
    """Encoded held-out images, kept on the device."""

    latents: Float[Tensor, "B C H W"]
    condition: Condition
    unconditional: Condition
    index: list[int]


class Validation:
    """Measures a network on the held-out split."""

    def __init__(
        self, run: RunConfig, shards: Shards, examples: Examples, objective: Objective, *, world: World | None = None
    ) -> None:
        """The batches are shared out over the processes of `world`, which all ask and all get the whole answer."""
        self.run, self.shards, self.examples, self.objective = run, shards, examples, objective
        self.world = world or World()
        self.count = run.validation.timesteps
        midpoints = (torch.arange(self.count, dtype=torch.float64) + 0.5) / self.count
        self.timesteps = TIMESTEP.build(LogitNormalConfig()).from_uniform(midpoints).to(examples.device)
        self._images: list[_Images] = []
        self._whole: list[_Images] = []

    def measure(self, model: Backbone, averages: Averages) -> dict[str, float]:
        """Mean losses by metric name.

        val/loss (averaged weights), val/loss_raw (the trained ones), val/loss_t0 … t3 (by quarter of the law of t, from
        clean to noisy) and val/loss_unconditional (with the empty caption: the difference is what the text is worth).
        With validation.whole also val/loss_whole (averaged weights, images that are not cut to squares).
        """
        with averages.applied(model, None):
            raw = self.losses(model)
        with averages.applied(model, averages.best):
            averaged = self.losses(model) if averages.best else raw
            unconditional = self.losses(model, unconditional=True)
            whole = self.losses(model, whole=True) if self.run.validation.whole else None
        metrics = {"val/loss": averaged.mean(), "val/loss_raw": raw.mean(), "val/loss_unconditional": unconditional.mean()}
        if whole is not None:
            metrics["val/loss_whole"] = whole.mean()
        quarter = torch.arange(self.count) * BINS // self.count
        for number in range(BINS):
            if (quarter == number).any():
                metrics[f"val/loss_t{number}"] = averaged[:, quarter == number].mean()
        return {name: value.item() for name, value in metrics.items()}

    @torch.no_grad()
    def losses(
        self, model: Backbone, *, unconditional: bool = False, whole: bool = False, move: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "S T"]:
        """The loss of every held-out image, in their order, at every timestep, float64 on the CPU.

        `move` changes the position maps (B, N, 2).
        """
        was_training = model.training
        model.eval()
        low = self.run.train.precision is Precision.bf16
        mine: dict[int, list[float]] = {}
        for images in self._encoded(model, whole):
            condition = images.unconditional if unconditional else images.condition
            if move is not None:
                condition = dataclasses.replace(condition, position=move(condition.position))
            columns = []
            for k, t in enumerate(self.timesteps):
                noise = rng.normal(_SEED, f"validation/noise/{k}", images.index, images.latents.shape[1:])
                with torch.autocast(self.examples.device.type, dtype=torch.bfloat16, enabled=low):
                    loss = self.objective.velocity_error(
                        model,
                        images.latents,
                        noise=self.examples.to_device(noise),
                        timestep=t.expand(len(images.index)),
                        condition=condition,
                        route=None,
                    )
                columns.append(loss)
            mine.update(zip(images.index, torch.stack(columns, dim=1).tolist(), strict=True))
        model.train(was_training)
        found = {image: losses for part in self.world.gathered(mine) for image, losses in part.items()}
        return torch.tensor([found[image] for image in sorted(found)], dtype=torch.float64)

    def _encoded(self, model: Backbone, whole: bool) -> Iterator[_Images]:
        """The held-out images: encoded at the first pass and kept, since they never change."""
        kept = self._whole if whole else self._images
        if kept:
            yield from kept
            return
        wanted, read = self.run.validation, whole_batches if whole else validation_batches
        side = self.run.crop.size // (self.run.autoencoder.factor * self.run.model.patch)
        per_pass = images_per_pass((side, side), self.examples.device)  # whole images have about as many tokens
        # several processes take turns by the pass, as many for each: a forward pass of FSDP2 is one of all of them
        held = whole_passes(wanted.batch_size, per_pass) if self.world.size == 1 else per_pass
        for batch in read(self.run, self.shards, samples=wanted.samples, batch_size=held, part=self.world.part):
            for some in (batch.rows(rows) for rows in passes(range(len(batch)), per_pass)):
                images = _Images(
                    latents=self.examples.latents(some.pixels, None),
                    condition=self.examples.condition(some, some.captions, model),
                    unconditional=self.examples.condition(some, [""] * len(some), model),
                    index=some.index,
                )
                kept.append(images)
                yield images
