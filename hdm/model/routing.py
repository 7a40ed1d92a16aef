"""The routing axis: which image tokens bypass the middle of the network in training.

A bypassing token skips every encoder and decoder block and returns unchanged behind them; text always takes the whole way. Skip
states live inside the route, so each merge sees the same tokens on both of its sides (spec 4).
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from hdm.config.axes import ROUTING
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.backbone import Route


@dataclass(kw_only=True, slots=True)
class TreadConfig:
    """A random part of each image's tokens bypasses (TREAD, Krause et al., 2025)."""

    takes: ClassVar[dict[str, str]] = {"grid": "a part of the image tokens bypasses"}

    rate: float = option(0.5, "fraction of image tokens that bypass; 0.0 means none")

    def check(self, run: RunConfig) -> None:
        """Refuse a rate that leaves nothing to compute."""
        from hdm.config.check import require

        require(0 <= self.rate < 1, f"routing.rate={self.rate}: must be at least 0 and below 1")


@dataclass(kw_only=True, slots=True)
class NoneConfig:
    """Every token takes every block."""

    takes: ClassVar[dict[str, str]] = {"route": "it routes nothing"}


class Routing:
    """Chooses the tokens that take the middle of the network."""

    def kept(self, route: Route | None, tokens: int) -> Int[Tensor, "B K"] | None:
        """Indices, in ascending order, of the image tokens that stay; None when all of them do."""
        raise NotImplementedError


@ROUTING.register("tread", TreadConfig)
class Tread(Routing):
    """N - int(N rate) tokens stay, the first of the order that the route's uniform draws give."""

    def __init__(self, config: TreadConfig) -> None:
        self.rate = config.rate

    def kept(self, route: Route | None, tokens: int) -> Int[Tensor, "B K"] | None:
        """See Routing. `route.rate` wins over the configured rate unless it is None."""
        if route is None:
            return None
        rate = self.rate if route.rate is None else route.rate
        keep = tokens - int(tokens * rate)
        if keep == tokens:
            return None
        return route.noise.argsort(dim=1)[:, :keep].sort(dim=1).values


@ROUTING.register("none", NoneConfig)
class NoRouting(Routing):
    """See NoneConfig."""

    def __init__(self, config: NoneConfig) -> None:
        pass

    def kept(self, route: Route | None, tokens: int) -> Int[Tensor, "B K"] | None:
        """All of them, whatever is asked."""
        return None
