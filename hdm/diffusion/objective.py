"""What the network is trained to predict, and how its output is read as a velocity.

Training takes `loss`, which differs between objectives. Validation takes `velocity_error` and sampling `as_velocity`, which mean
the same for all of them: arms that differ in their objective can be compared, and any sampler draws from any network.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.config.axes import OBJECTIVE
from hdm.config.check import require
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.backbone import Backbone, Condition, Route, Tap


class Objective(ABC):
    """A training target with its loss."""

    def loss(
        self,
        model: Backbone,
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        route: Route | None,
        tap: Tap | None = None,
    ) -> Float[Tensor, " B"]:
        """Loss of every sample, float32, mean over its elements; the caller averages over the batch. `tap` goes to the network."""
        asked = {} if tap is None else {"tap": tap}  # a backbone without taps need not know them
        output = model(interpolate(latents, noise, timestep), timestep, condition, route=route, **asked)
        return self.compare(output.float(), latents, noise=noise, timestep=timestep)

    def target(self, latents: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """What the network's output is compared with: the velocity, unless a class says otherwise."""
        return noise - latents

    @abstractmethod
    def compare(
        self,
        output: Float[Tensor, "B C H W"],
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """Loss of every sample, given what the network answered at x_t."""

    def as_velocity(self, model: Backbone) -> Backbone:
        """`model` as samplers and guidance take it: its output is the velocity."""
        return model

    def velocity_error(
        self,
        model: Backbone,
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        route: Route | None,
    ) -> Float[Tensor, " B"]:
        """|v_theta(x_t, t) - (eps - x)|^2 of every sample, whatever training adds to it or weighs it with."""
        velocity = self.as_velocity(model)(interpolate(latents, noise, timestep), timestep, condition, route=route)
        return mean_square(velocity.float() - (noise - latents))


def interpolate(
    latents: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], timestep: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """x_t = (1 - t) x + t eps."""
    t = timestep[:, None, None, None]
    return (1 - t) * latents + t * noise


def mean_square(error: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Mean over the elements of each sample."""
    return error.square().flatten(1).mean(1)


@dataclass(kw_only=True, slots=True)
class VelocityConfig:
    """Flow matching: mean squared error of the velocity v = eps - x at x_t = (1 - t) x + t eps (spec 1.4 and 11)."""


@OBJECTIVE.register("velocity", VelocityConfig)
class Velocity(Objective):
    """|v_theta(x_t, t) - (eps - x)|^2, unweighted."""

    def __init__(self, config: VelocityConfig) -> None:
        pass

    def compare(  # noqa: D102
        self,
        output: Float[Tensor, "B C H W"],
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        return mean_square(output - self.target(latents, noise))


@dataclass(kw_only=True, slots=True)
class CosineConfig:
    """Velocity error plus weight (1 - cos(v_theta, v)), over the channels of each latent pixel (LightningDiT, spec 11)."""

    weight: float = option(1.0, "weight of the cosine term; LightningDiT has 1")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a term that rewards the wrong direction."""
        require(self.weight >= 0, f"objective.weight={self.weight}: must be 0 or above")


@OBJECTIVE.register("cosine", CosineConfig)
class Cosine(Objective):
    """|v_theta - v|^2 + weight mean(1 - cos_channels(v_theta, v))."""

    def __init__(self, config: CosineConfig) -> None:
        self.weight = config.weight

    def compare(  # noqa: D102
        self,
        output: Float[Tensor, "B C H W"],
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        target = self.target(latents, noise)
        angle = 1 - torch.nn.functional.cosine_similarity(output, target, dim=1)
        return mean_square(output - target) + self.weight * angle.flatten(1).mean(1)


@dataclass(kw_only=True, slots=True)
class ContrastiveConfig:
    """Contrastive flow matching: |v_theta - v|^2 - weight |v_theta - v'|^2, v' the target of another sample (Stoica et al., 2025).

    v' is that of the next sample in the (micro-)batch, whose order the run's seed has drawn. The best prediction is
    (v - weight E v') / (1 - weight): away from what all images share. The paper subtracts that bias again under classifier-free
    guidance; here nothing is subtracted, and the validation loss contains it.
    """

    weight: float = option(0.05, "weight of the repulsion; at 1 and above the loss has no minimum")

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for a loss without a minimum, or batches without another sample."""
        require(0 <= self.weight < 1, f"objective.weight={self.weight}: must be at least 0 and below 1; the paper has 0.05")
        t = run.train
        require(
            t.batch_size // t.accumulation > 1,
            f"objective=contrastive: train.batch_size={t.batch_size} / train.accumulation={t.accumulation} leaves one image"
            " per micro-batch and no other to compare it with; lower train.accumulation",
        )


@OBJECTIVE.register("contrastive", ContrastiveConfig)
class Contrastive(Objective):
    """|v_theta - v|^2 - weight |v_theta - roll(v)|^2."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self.weight = config.weight

    def compare(  # noqa: D102
        self,
        output: Float[Tensor, "B C H W"],
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        if len(latents) < 2:
            raise ValueError("objective=contrastive: a batch of one holds no other sample")
        target = self.target(latents, noise)
        return mean_square(output - target) - self.weight * mean_square(output - target.roll(-1, dims=0))


class Space(Enum):
    """Where an x-prediction is compared."""

    v = "v"
    x = "x"


@dataclass(kw_only=True, slots=True)
class XPredictionConfig:
    """The network predicts the image x; its velocity is (x_t - x_theta) / max(t, t_min) (JiT: Li and He, 2025).

    For pixels in large patches, where noise cannot pass through the network but images can. The loss in v-space is
    |x_theta - x|^2 / max(t, t_min)^2: the velocity error, with JiT's bound on its weight. JiT counts time from noise to image: its
    law of t, P_mean -0.8 and P_std 0.8, is timestep.mean=0.8 timestep.std=0.8 here.
    """

    space: Space = option(Space.v, "v: error of the velocity, as JiT; x: error of the image, unweighted")
    t_min: float = option(0.05, "smallest t that is divided by, in the loss and in sampling")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for a division by zero."""
        require(0 < self.t_min < 1, f"objective.t_min={self.t_min}: must lie between 0 and 1; JiT has 0.05")


@OBJECTIVE.register("x_prediction", XPredictionConfig)
class XPrediction(Objective):
    """|x_theta - x|^2, over max(t, t_min)^2 in v-space."""

    def __init__(self, config: XPredictionConfig) -> None:
        self.space, self.t_min = config.space, config.t_min

    def target(self, latents: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The image."""
        return latents

    def compare(  # noqa: D102
        self,
        output: Float[Tensor, "B C H W"],
        latents: Float[Tensor, "B C H W"],
        *,
        noise: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        error = mean_square(output - self.target(latents, noise))
        return error if self.space is Space.x else error / timestep.clamp_min(self.t_min).square()

    def as_velocity(self, model: Backbone) -> Backbone:
        """`model` with its images turned into velocities."""
        return ImageToVelocity(model, self.t_min)


class ImageToVelocity(Backbone):
    """A network that predicts images, as one that predicts velocities: (x_t - x_theta) / max(t, t_min), float32."""

    def __init__(self, model: Backbone, t_min: float) -> None:
        super().__init__()
        self.model, self.t_min = model, t_min

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        timestep: Float[Tensor, " B"],
        condition: Condition,
        *,
        route: Route | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """The velocity."""
        asked = {} if tap is None else {"tap": tap}
        image: Tensor = self.model(x, timestep, condition, route=route, **asked)
        return (x.float() - image.float()) / timestep.clamp_min(self.t_min)[:, None, None, None]

    def position_map(self, view: Float[Tensor, "B 6"], grid: tuple[int, int]) -> Float[Tensor, "B N 2"]:
        """The network's own."""
        return self.model.position_map(view, grid)
