"""Moving averages of the weights, kept in fp32 beside them.

Plain: theta_bar <- d theta_bar + (1 - d) theta, from the initial weights on.
Power-function (EDM2, Karras et al., arXiv 2312.02696): theta_bar <- beta_t theta_bar + (1 - beta_t) theta with
beta_t = (1 - 1/t)^(gamma + 1). Step k then weighs about k^gamma: the average spans a fixed fraction of the run, however long it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hdm.config.schema import EmaConfig
from hdm.train.parallel import local, reshard

POWER, DECAY = "power", "decay"


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power-function average whose standard deviation is `sigma_rel` times the length of training.

    The largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); sigma_rel below 12^-1/2 = 0.2887 gives gamma > 0.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


class Averages:
    """The averages that a run keeps: by name, one tensor for each parameter of the model, in its order.

    They are of `weights`, by default the model's own (see `hdm.train.optimizer.Optimizer.evaluated`).
    """

    def __init__(self, model: nn.Module, config: EmaConfig, *, weights: list[Tensor] | None = None) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = [p.data for p in model.parameters()] if weights is None else weights
        self.decay = config.decay
        self.gamma = power_exponent(config.power) if config.power > 0 else 0.0
        kept = [name for name, width in ((POWER, config.power), (DECAY, config.decay)) if width > 0]
        self.tensors = {name: [p.detach().float().clone() for p in model.parameters()] for name in kept}

    @property
    def best(self) -> str | None:
        """The average that validation and sampling use: power, else plain, else None for the raw weights."""
        return next(iter(self.tensors), None)

    @torch.no_grad()
    def update(self, *, samples: int, fresh: int) -> None:
        """Take in the weights after a step over `fresh` samples that brought those seen to `samples`: 1/t = fresh / samples."""
        for name, tensors in self.tensors.items():
            beta = (1 - fresh / samples) ** (self.gamma + 1) if name == POWER else self.decay
            torch._foreach_lerp_(tensors, self.weights, 1 - beta)

    def state(self, name: str) -> dict[str, Tensor]:
        """The average `name` by parameter name."""
        return dict(zip(self.names, self.tensors[name], strict=True))

    @contextmanager
    def applied(self, model: nn.Module, name: str | None) -> Iterator[None]:
        """The model with average `name` inside the `with` (None: the weights that are averaged); only shards are copied."""
        reshard(model)
        parameters, chosen = list(model.parameters()), self.weights if name is None else self.tensors[name]
        if any(isinstance(p, DTensor) for p in parameters):  # FSDP2 holds on to the memory of its shards
            with _swapped([local(p.data) for p in parameters], [local(average) for average in chosen]):
                yield
                reshard(model)
            return
        raw = [p.data for p in parameters]
        for parameter, average in zip(parameters, chosen, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(parameters, raw, strict=True):
                parameter.data = data


@contextmanager
def _swapped(own: list[Tensor], others: list[Tensor]) -> Iterator[None]:
    kept = [tensor.clone() for tensor in own]
    torch._foreach_copy_(own, others)
    try:
        yield
    finally:
        torch._foreach_copy_(own, kept)
