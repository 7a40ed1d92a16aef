"""The routing axis: which image tokens bypass a part of the network in training.

A network is three sections of blocks, before, middle and after, with borders at `model.pre_depth` and `model.post_depth`. A variant
says which of them see a part of the image tokens only, and what the others find in the place of a token that was away. Text always
takes the whole way. Skip states live inside the routed part, so each merge sees the same tokens on both of its sides (spec 4).
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hdm.config.axes import ROUTING
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, RunConfig
from hdm.model.backbone import Route
from hdm.model.init import Init, normal


@dataclass(kw_only=True, slots=True)
class RateConfig:
    """What all routings have in common."""

    takes: ClassVar[dict[str, str]] = {"grid": "a part of the image tokens bypasses the blocks"}

    rate: float = option(0.5, "fraction of image tokens that bypass; 0.0 means none")

    def check(self, run: RunConfig) -> None:
        """Refuse a rate that leaves nothing to compute."""
        from hdm.config.check import require

        require(0 <= self.rate < 1, f"routing.rate={self.rate}: must be at least 0 and below 1")

    def require_decoder(self, run: RunConfig, name: str) -> None:
        """Refuse a network that ends with the route."""
        from hdm.config.check import require

        require(
            run.model.post_depth > 0,
            f"model.post_depth=0: routing={name} needs blocks behind the route; set model.post_depth=1 or more",
        )


@dataclass(kw_only=True, slots=True)
class TreadConfig(RateConfig):
    """A random part of each image's tokens bypasses the middle (TREAD, Krause et al., 2025)."""

    routes: int = option(1, "routes one behind the other, each around an equal share of the middle, each with a subset of its own")
    ordered: bool = option(
        True, "the kept tokens keep their order (HDM); false: they come in the order of the draws (TREAD's code)"
    )

    def check(self, run: RunConfig) -> None:
        """Refuse routes that have no blocks."""
        from hdm.config.check import require

        RateConfig.check(self, run)
        require(self.routes >= 1, f"routing.routes={self.routes}: must be 1 or more; routing=none routes nothing")


@dataclass(kw_only=True, slots=True)
class DeferredMaskConfig(RateConfig):
    """All tokens meet in a few mixer blocks, then a part leaves for good and is not learned (MicroDiT, Sehwag et al., 2024).

    The output of a removed patch is 0. Our mixer has the width of the network; MicroDiT-XL's is narrower (6 blocks of 768).
    """

    rate: float = option(0.75, "fraction of image tokens that are removed behind the mixer; 0.0 means none")
    mixer: int = option(2, "mixer blocks")

    def check(self, run: RunConfig) -> None:
        """Refuse a mixer that is none."""
        from hdm.config.check import require

        RateConfig.check(self, run)
        require(self.mixer >= 1, f"routing.mixer={self.mixer}: must be 1 or more, or removed tokens are never seen")


@dataclass(kw_only=True, slots=True)
class MaskMaeConfig(RateConfig):
    """Removed tokens come back as one learned token behind the middle and are learned to reconstruct (MaskDiT, Zheng et al., 2023).

    Blocks before and middle are the encoder, blocks after the decoder. Where a patch was removed the output is compared with the
    normed patch of x_t instead of the velocity; the paper's target is the noisy input too.
    """

    needs: ClassVar[dict[str, str]] = {"free_decoder": "its decoder sees more tokens than its encoder"}

    weight: float = option(0.1, "weight of the reconstruction loss")

    def check(self, run: RunConfig) -> None:
        """Refuse a negative weight, and a network without a decoder."""
        from hdm.config.check import require

        RateConfig.check(self, run)
        require(self.weight >= 0, f"routing.weight={self.weight}: must be 0 or above")
        self.require_decoder(run, "mask_mae")


@dataclass(kw_only=True, slots=True)
class SprintConfig(RateConfig):
    """The middle sees few tokens; padded by a learned token, its output is fused with its input (SPRINT, Park et al., 2025).

    Our reading of the paper's text: before is its dense encoder, after its dense decoder, fusion is a linear layer on [input;
    output], for all tokens and whether they were away or not. A pass with rate 1 skips the middle (path-drop guidance).
    """

    rate: float = option(0.75, "fraction of image tokens that bypass the middle; 0.0 means none")

    def check(self, run: RunConfig) -> None:
        """Refuse a network without a decoder."""
        RateConfig.check(self, run)
        self.require_decoder(run, "sprint")


@dataclass(kw_only=True, slots=True)
class NoneConfig:
    """Every token takes every block."""

    takes: ClassVar[dict[str, str]] = {"route": "it routes nothing"}


class Section(Enum):
    """The first routed section; all that follow it up to the place where the tokens come back are routed too."""

    before = "before"
    middle = "middle"


class Routing(nn.Module):
    """Chooses the tokens that stay, and says what is found where the others are back.

    `enters` is the first section with the kept tokens only. `returns`: the others are back behind the middle. `reconstruction` is
    the weight of the loss on removed patches; None: nothing is removed, every prediction counts.
    """

    enters = Section.middle
    returns = True
    routes = 1
    mixers = 0
    reconstruction: float | None = None

    def __init__(self, config: object, size: ModelConfig) -> None:
        super().__init__()

    def kept(self, route: Route | None, tokens: int, *, number: int = 0) -> Int[Tensor, "B K"] | None:
        """Indices of the image tokens that stay in route `number`; None when all of them do."""
        raise NotImplementedError

    def skips(self, route: Route | None) -> bool:
        """Whether a pass skips the middle."""
        return route is not None and route.rate == 1.0

    def join(
        self, outer: Float[Tensor, "B T D"], inner: Float[Tensor, "B S D"] | None, index: Int[Tensor, "B S"] | None
    ) -> Float[Tensor, "B R D"]:
        """The whole sequence behind the route.

        `outer` entered it, `inner` comes out of it at the places `index` (None: all, in order). `inner` None: it was skipped. Where
        the network ends with the route, `inner` has image tokens only.
        """
        if inner is None:
            return outer
        return inner if index is None else scatter(outer, inner, index)


def scatter(outer: Float[Tensor, "B T D"], inner: Float[Tensor, "B S D"], index: Int[Tensor, "B S"]) -> Float[Tensor, "B T D"]:
    """`outer` with `inner` at the places `index`."""
    return outer.scatter(1, index[..., None].expand_as(inner), inner.to(outer.dtype))


def filled(token: Float[Tensor, " D"], inner: Float[Tensor, "B S D"], index: Int[Tensor, "B S"], length: int) -> Tensor:
    """`inner` at the places `index` of a sequence of `length`, and `token` elsewhere."""
    empty = token.to(inner.dtype).expand(inner.shape[0], length, -1)
    return scatter(empty, inner, index)


@ROUTING.register("tread", TreadConfig)
class Tread(Routing):
    """N - int(N rate) tokens stay, the first of the order that the route's uniform draws give; the others pass unchanged."""

    ordered = True
    rounds_kept = False  # masks round the number that stays, routes that of the others: 127 or 128 of 255 at 0.5 (spec 4)

    def __init__(self, config: RateConfig, size: ModelConfig) -> None:
        super().__init__(config, size)
        self.rate = config.rate
        if isinstance(config, TreadConfig):
            self.routes, self.ordered = config.routes, config.ordered

    def kept(self, route: Route | None, tokens: int, *, number: int = 0) -> Int[Tensor, "B K"] | None:
        """See Routing. `route.rate` wins over the configured rate unless it is None."""
        if route is None or self.skips(route):
            return None
        rate = self.rate if route.rate is None else route.rate
        keep = max(int(tokens * (1 - rate)), 1) if self.rounds_kept else tokens - int(tokens * rate)
        if keep == tokens:
            return None
        ids = _redrawn(route.noise, number).argsort(dim=1)[:, :keep]
        return ids.sort(dim=1).values if self.ordered else ids


def _redrawn(noise: Float[Tensor, "B N"], number: int) -> Float[Tensor, "B N"]:
    """The uniform draws of route `number`, made of those of the first.

    float32 draws are multiples of 2^-24. Multiplying by an odd number, modulo 1, maps these onto each other one to one: the result
    is as uniform as the draws, and its order has nothing to do with theirs.
    """
    if number == 0:
        return noise
    factor = pow(10368889, number, 2**24)
    return (noise.double() * factor) % 1.0


@ROUTING.register("deferred_mask", DeferredMaskConfig)
class DeferredMask(Tread):
    """See DeferredMaskConfig."""

    enters = Section.before
    rounds_kept = True
    returns = False
    reconstruction = 0.0

    def __init__(self, config: DeferredMaskConfig, size: ModelConfig) -> None:
        super().__init__(config, size)
        self.mixers = config.mixer


@ROUTING.register("mask_mae", MaskMaeConfig)
class MaskMae(Tread):
    """See MaskMaeConfig."""

    enters = Section.before
    rounds_kept = True

    def __init__(self, config: MaskMaeConfig, size: ModelConfig) -> None:
        super().__init__(config, size)
        self.reconstruction = config.weight
        self.mask_token = nn.Parameter(torch.empty(size.dim))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"mask_token": normal(0.02)}

    def join(
        self, outer: Float[Tensor, "B T D"], inner: Float[Tensor, "B S D"] | None, index: Int[Tensor, "B S"] | None
    ) -> Float[Tensor, "B R D"]:
        """See Routing. What entered is of no more use: removed tokens come back as the mask token."""
        if inner is None or index is None:
            return Routing.join(self, outer, inner, index)
        return filled(self.mask_token, inner, index, outer.shape[1])


@ROUTING.register("sprint", SprintConfig)
class Sprint(Tread):
    """Linear([input; output of the middle, padded])."""

    def __init__(self, config: SprintConfig, size: ModelConfig) -> None:
        super().__init__(config, size)
        self.mask_token = nn.Parameter(torch.empty(size.dim))
        self.fuse = nn.Linear(2 * size.dim, size.dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"mask_token": normal(0.02)}

    def join(
        self, outer: Float[Tensor, "B T D"], inner: Float[Tensor, "B S D"] | None, index: Int[Tensor, "B S"] | None
    ) -> Float[Tensor, "B R D"]:
        """See Routing."""
        if inner is None:
            inner = self.mask_token.to(outer.dtype).expand_as(outer)
        elif index is not None:
            inner = filled(self.mask_token, inner, index, outer.shape[1])
        return self.fuse(torch.cat([outer, inner.to(outer.dtype)], dim=-1))


@ROUTING.register("none", NoneConfig)
class NoRouting(Routing):
    """See NoneConfig."""

    def kept(self, route: Route | None, tokens: int, *, number: int = 0) -> Int[Tensor, "B K"] | None:
        """All of them, whatever is asked."""
        return None
