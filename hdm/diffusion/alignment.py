"""Alignment losses: what a block of the backbone knows about the clean image, held against a frozen image network (spec 8).

The objective asks the backbone for the image tokens behind one block (`hdm.model.backbone.Tap`); a projector that is trained with
the network maps them to the teacher's features of the same crop. Projector and teacher serve training alone: they are not part of
the backbone that validation, sampling and evaluation load.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hdm.conditioning.teacher import Teacher
from hdm.config.axes import ALIGNMENT, TEACHER
from hdm.config.check import require
from hdm.config.errors import ConfigError
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.backbone import Backbone, Tap
from hdm.model.init import materialize


@dataclass(kw_only=True, slots=True)
class NoneConfig:
    """No alignment loss."""


@dataclass(kw_only=True, slots=True)
class RepaConfig:
    """REPA (Yu et al., 2024): minus the cosine between projected tokens and a teacher's features of the clean crop (spec 8)."""

    needs: ClassVar[dict[str, str]] = {"one_grid": "the teacher's features lie on the grid of the aligned block"}

    weight: float = option(0.5, "weight of the alignment loss; REPA has 0.5")
    depth: int | None = option(
        None,
        "block whose output is aligned, 1 is the first; null: the middle of a U's encoder, else a third of the blocks, 8 at most",
    )
    hidden: int = option(2048, "hidden width of the projector")

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for a block that is not there or a term that rewards the wrong direction."""
        require(self.weight > 0, f"alignment.weight={self.weight}: must be above 0; alignment=none leaves the term out")
        require(self.hidden > 0, f"alignment.hidden={self.hidden}: must be above 0; REPA has 2048")
        blocks = self.blocks(run)
        require(
            getattr(run.optimizer, "kept", 2) < 3,
            "alignment=repa: the projector is saved as it is trained, which optimizer=schedule_free cannot resume from; use"
            " optimizer=adamw",
        )
        require(
            1 <= self.block(run) <= blocks,
            f"alignment.depth={self.depth}: the backbone has {blocks} blocks; choose 1 to {blocks} (null: {self.default(run)})",
        )

    def block(self, run: RunConfig) -> int:
        """The number of the aligned block."""
        return self.default(run) if self.depth is None else self.depth

    def default(self, run: RunConfig) -> int:
        """8 of REPA's 24 or 28 blocks (spec 8); in a U an encoder block, the one that ends the first half of the encoder."""
        m = run.model
        if not hasattr(run.backbone, "count"):
            return m.pre_depth + math.ceil(m.depth * m.enc_blocks / 2)
        return min(8, math.ceil(self.blocks(run) / 3))

    def blocks(self, run: RunConfig) -> int:
        """How many blocks the backbone has: what its config counts, or as many as XUT at these sizes."""
        count: int = run.backbone.count(run.model) if hasattr(run.backbone, "count") else run.model.blocks
        return count


class Alignment(nn.Module):
    """A loss beside the objective's. Its parameters are trained with the network's, by the same rules."""

    weight: float = 0.0

    def tap(self) -> Tap | None:
        """The request to the next forward pass; None when nothing is wanted of it."""
        return None

    def target(self, pixels: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B N Z"] | None:
        """What the filled tap is held against, from the clean crops."""
        return None

    def loss(self, tap: Tap | None, target: Float[Tensor, "B N Z"] | None) -> Float[Tensor, " B"] | None:
        """The unweighted loss of every sample, float32, mean over its tokens; None without a loss."""
        return None


@ALIGNMENT.register("none", NoneConfig)
class NoAlignment(Alignment):
    """See NoneConfig."""

    def __init__(self, config: NoneConfig, run: RunConfig, model: Backbone, *, device: torch.device | str) -> None:
        super().__init__()


@ALIGNMENT.register("repa", RepaConfig)
class Repa(Alignment):
    """See RepaConfig."""

    def __init__(self, config: RepaConfig, run: RunConfig, model: Backbone, *, device: torch.device | str) -> None:
        super().__init__()
        self.weight, self.depth = config.weight, config.block(run)
        try:
            width = model.tap_width(self.depth)
        except ValueError as error:
            raise ConfigError(f"alignment.depth={self.depth}: {error}") from None
        self._teacher: Teacher = TEACHER.build(run.teacher, device=device)
        with torch.device("meta"):
            self.projector = projector(width, config.hidden, self._teacher.width)
        named = nn.ModuleDict({"alignment": self})  # draws are keyed by name, and no parameter of the network has this one
        materialize(named, device, run.seed)

    def tap(self) -> Tap:
        """See Alignment."""
        return Tap(depth=self.depth)

    def target(self, pixels: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B N Z"]:
        """See Alignment."""
        return self._teacher.features(pixels, grid)

    def loss(self, tap: Tap | None, target: Float[Tensor, "B N Z"] | None) -> Float[Tensor, " B"]:
        """See Alignment. Raises ValueError when the forward pass has not filled the tap."""
        if tap is None or tap.tokens is None or target is None:
            raise ValueError(f"the backbone did not fill the tap behind block {self.depth}")
        return misalignment(self.projector(tap.tokens), target, tap.kept)


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's: three linear maps with SiLU between them; 8,131,328 parameters for 1152 -> 2048 -> 768 (spec 8)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


def misalignment(
    projected: Float[Tensor, "B K Z"], target: Float[Tensor, "B N Z"], kept: Int[Tensor, "B K"] | None = None
) -> Float[Tensor, " B"]:
    """Minus the cosine of every token with its feature, mean over the tokens: in [-1, 1].

    `kept` holds the tokens' places among all N where some were routed around the block. Lengths are divided out in float32 or
    better, also under autocast: in half precision they overflow.
    """
    if kept is not None:
        target = target.take_along_dim(kept[..., None], dim=1)
    with torch.autocast(projected.device.type, enabled=False):
        if projected.dtype in (torch.bfloat16, torch.float16):
            projected = projected.float()
        a, b = F.normalize(projected, dim=-1), F.normalize(target.to(projected.dtype), dim=-1)
        return -(a * b).sum(-1).mean(-1)
