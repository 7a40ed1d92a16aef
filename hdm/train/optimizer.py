"""The optimizer axis: the update rule, and the learning rate that each tensor gets from one base rate.

rule=mup_report, the HDM report's: lr / fan_in of every tensor, vectors included: muP with base width 1 wherever the fan-in grows.
rule=mup, that of the muP papers for Adam (spec 10): what a tensor reads of the width divides its rate. Vectors and input layers get
lr / base_width at any width, hidden matrices and output layers that times (width read at base_width) / (width read). Both rules
give a d x d matrix lr / d; at d = base_width every tensor of mup has one rate. The output layer has no multiplier in the forward
pass: dividing its rate and its initial values, 1/d^2 here, does the same in Adam.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hdm.config.axes import OPTIMIZER
from hdm.config.check import require
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.init import stated
from hdm.model.width import Role, growth
from hdm.train.orthogonal import orthogonalize
from hdm.train.parallel import whole


class RateRule(Enum):
    """How a tensor's learning rate follows from the base rate."""

    mup_report = "mup_report"
    mup = "mup"
    constant = "constant"


class Adjust(Enum):
    """What the rate of an orthogonalized A x B update is multiplied by."""

    original = "original"
    match_rms_adamw = "match_rms_adamw"


@dataclass(kw_only=True, slots=True)
class AdamWConfig:
    """AdamW with decoupled weight decay on every parameter (spec 1.4), its rate divided by each tensor's fan-in (muP, spec 10)."""

    kept: ClassVar[int] = 2  # numbers that a step keeps of each parameter, for the plan

    lr: float = option(0.5, "base learning rate; with rule=mup_report or rule=mup a d x d matrix gets lr/d")
    rule: RateRule = option(
        RateRule.mup_report,
        "mup_report: lr / fan_in of every tensor; mup: of hidden and output matrices only, lr / base_width for vectors and input"
        " layers (Tensor Programs V); constant: lr for every tensor",
    )
    base_width: int = option(1024, "model.dim at which rule=mup gives every tensor the same rate")
    betas: list[float] = option([0.9, 0.98], "decay of the first and of the second moment")
    weight_decay: float = option(0.02, "a step multiplies every parameter by 1 - rate x weight_decay")
    compensate_decay: bool = option(
        False,
        "a step multiplies every parameter by 1 - lr / base_width x weight_decay, whatever its own rate (MuAdamW); HDM does not",
    )
    eps: float = option(1e-8, "added to the root of the second moment")

    def check(self, _: RunConfig) -> None:
        """Raise ConfigError for values outside AdamW's domain."""
        require(self.lr > 0, f"optimizer.lr={self.lr}: must be above 0")
        require(
            self.base_width >= 1, f"optimizer.base_width={self.base_width}: must be 1 or above, such as 1024, the width of XUT-base"
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={self.betas}: must be two numbers, 0 or above and below 1, such as [0.9,0.98]",
        )
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: must be 0 or above")
        require(self.eps > 0, f"optimizer.eps={self.eps}: must be above 0")


@dataclass(kw_only=True, slots=True)
class MuonConfig(AdamWConfig):
    """Muon for the hidden matrices, whose momentum is orthogonalized (Jordan et al., 2024), AdamW for all other tensors.

    `lr`, `rule`, `betas`, `weight_decay` and `eps` belong to AdamW. Hidden are the two-dimensional weights whose two sides grow
    with the network's width. An orthogonal update is of the same size at any width in the norm that muP asks for (Yang et al.,
    arXiv 2310.17813), so with adjust=original `hidden_lr` needs no rule.
    """

    kept: ClassVar[int] = 1

    hidden_lr: float = option(
        0.02, "rate of the orthogonalized update; with adjust=match_rms_adamw take a rate of AdamW, such as 5e-4"
    )
    adjust: Adjust = option(
        Adjust.original,
        "factor of an A x B matrix: original: sqrt(max(1, A/B)); match_rms_adamw: 0.2 sqrt(max(A, B)) (arXiv 2502.16982)",
    )
    hidden_decay: float = option(0.0, "weight decay of the hidden matrices; torch's default is 0.1")
    momentum: float = option(0.95, "decay of the averaged gradient")
    nesterov: bool = option(True, "the gradient is mixed into the averaged one once more before it is orthogonalized")
    ns_steps: int = option(5, "Newton-Schulz iterations, in bf16")
    split: bool = option(
        True, "matrices that one layer holds stacked (q, k, v; gate, value) are orthogonalized apart: they are different maps"
    )

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for values outside their domain."""
        AdamWConfig.check(self, run)
        require(self.hidden_lr > 0, f"optimizer.hidden_lr={self.hidden_lr}: must be above 0")
        require(self.hidden_decay >= 0, f"optimizer.hidden_decay={self.hidden_decay}: must be 0 or above")
        require(0 <= self.momentum < 1, f"optimizer.momentum={self.momentum}: must be 0 or above and below 1, such as 0.95")
        require(1 <= self.ns_steps < 100, f"optimizer.ns_steps={self.ns_steps}: must be between 1 and 99; 5 is usual")


@dataclass(kw_only=True, slots=True)
class ScheduleFreeConfig(AdamWConfig):
    """Schedule-Free AdamW (Defazio et al., arXiv 2405.15682): gradients at y, steps of z, and x, the average of z, is evaluated.

    x is a running average of the whole run that needs no schedule: validation, pictures and checkpoints use it, and ema.* averages
    it once more; ema.power=0 and ema.decay=0 leave x itself.
    """

    kept: ClassVar[int] = 3

    betas: list[float] = option([0.9, 0.999], "share of x in y = (1 - beta) z + beta x, and decay of the second moment")

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for values outside their domain, and for a schedule that decays."""
        AdamWConfig.check(self, run)
        require(
            not getattr(run.schedule, "decays", False),
            "optimizer=schedule_free: its average takes the place of a schedule that decays; use schedule=constant",
        )


class Optimizer(torch.optim.Optimizer):
    """What the loop needs of an update rule. Every group has a `base_lr`, which a schedule multiplies.

    A step divides all gradients by `grad_scale`, and leaves parameters and moments as they are when `found_inf` is 1; both are
    tensors on the device. What a step changes besides the parameters is in `state`, in tensors, or follows from it in `reloaded`.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def evaluated(self, model: nn.Module) -> list[Tensor]:
        """What is validated, averaged, drawn from and saved, a tensor for each parameter: the weights, if there are no others."""
        return [parameter.data for parameter in model.parameters()]

    def reloaded(self) -> None:
        """Called when a checkpoint has filled the parameters, with what `evaluated` names, and `state`."""


@OPTIMIZER.register("adamw", AdamWConfig)
class AdamW(Optimizer, torch.optim.AdamW):
    """torch's fused AdamW with one parameter group for each distinct rate."""

    def __init__(self, config: AdamWConfig, model: nn.Module) -> None:
        beta1, beta2 = config.betas
        super().__init__(parameter_groups(config, model), betas=(beta1, beta2), eps=config.eps, fused=True)


@OPTIMIZER.register("muon", MuonConfig)
class Muon(Optimizer):
    """See MuonConfig. torch.optim.Muon computes the same, but waits for the host to skip a step, and takes no stacked matrices."""

    def __init__(self, config: MuonConfig, model: nn.Module) -> None:
        grown, parts = growth(model), stated(model, "parts") if config.split else {}
        matrices: dict[int, list[Tensor]] = {}
        others = []
        for name, parameter in model.named_parameters():
            if parameter.ndim != 2 or grown[name].role is not Role.hidden:
                others.append(name)
            elif parameter.requires_grad:
                matrices.setdefault(parts.get(name, 1), []).append(parameter)
        hidden: list[dict[str, Any]] = [
            {"params": found, "parts": count, "lr": config.hidden_lr, "base_lr": config.hidden_lr}
            for count, found in matrices.items()
        ]
        beta1, beta2 = config.betas
        self.config = config
        self.adamw = torch.optim.AdamW(
            parameter_groups(config, model, names=others), betas=(beta1, beta2), eps=config.eps, fused=True
        )
        super().__init__([*hidden, *self.adamw.param_groups], {})
        self.hidden = self.param_groups[: len(hidden)]
        self.adamw.state = self.state  # one state, by parameter, for the checkpoint

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; see Optimizer."""
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        c, kept = self.config, 1 - self.found_inf
        parameters: list[Tensor] = []
        updates: list[Tensor] = []
        sizes: list[float] = []
        for group in self.hidden:
            for parameter, gradient in _clean(group, self):
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(gradient, (1 - c.momentum) * kept)
                pieces = (gradient.lerp(average, c.momentum) if c.nesterov else average).chunk(group["parts"])
                parameter.mul_(1 - group["lr"] * c.hidden_decay * kept)
                parameters += parameter.chunk(group["parts"])
                updates += pieces
                sizes += [group["lr"] * _adjusted(c.adjust, *piece.shape) for piece in pieces]
        for parameter, update, size in zip(parameters, orthogonalize(updates, steps=c.ns_steps), sizes, strict=True):
            parameter.sub_(update.to(parameter.dtype) * (size * kept))


@OPTIMIZER.register("schedule_free", ScheduleFreeConfig)
class ScheduleFree(Optimizer):
    """See ScheduleFreeConfig; with the rate g_t of step t, the schedule's factor f_t of it, and Adam's v_t debiased:

    z <- z - g_t (grad(y) / (sqrt(v_t) + eps) + weight_decay y),  x <- x + c_t (z - x) with c_t = f_t^2 / (f_1^2 + … + f_t^2),
    y <- (1 - beta1) z + beta1 x. The parameters are y. The paper weighs by g_t^2 with Adam's correction sqrt(1 - beta2^t) of early
    steps inside g_t; as in its authors' package here the correction stays with v_t and out of the weights.
    """

    def __init__(self, config: ScheduleFreeConfig, model: nn.Module) -> None:
        super().__init__(parameter_groups(config, model), {})
        self.config = config
        # x; a checkpoint holds it as the model's weights
        self.average: dict[Tensor, Tensor] = {parameter: parameter.detach().clone() for parameter in model.parameters()}

    def evaluated(self, model: nn.Module) -> list[Tensor]:
        """See Optimizer: x."""
        return [self.average[parameter] for parameter in model.parameters()]

    @torch.no_grad()
    def reloaded(self) -> None:
        """See Optimizer. The checkpoint holds x and z; y is made of them as a step makes it."""
        for parameter, x in self.average.items():
            x.copy_(parameter)
            if parameter in self.state:
                self._mix(parameter)

    def _mix(self, parameter: Tensor) -> None:
        parameter.copy_(self.state[parameter]["z"].lerp(self.average[parameter], self.config.betas[0]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; see Optimizer."""
        c, kept, beta2 = self.config, 1 - self.found_inf, self.config.betas[1]
        for group in self.param_groups:
            weight = (group["lr"] / group["base_lr"]) ** 2
            for parameter, gradient in _clean(group, self):
                state = self.state[parameter]
                if not state:
                    scalars = {name: torch.zeros((), device=parameter.device) for name in ("step", "weight")}
                    state.update(z=parameter.detach().clone(), exp_avg_sq=torch.zeros_like(parameter), **scalars)
                state["step"] += kept
                state["weight"] += weight * kept
                square = state["exp_avg_sq"].lerp_(gradient.square(), (1 - beta2) * kept)
                debiased = square / (1 - beta2 ** state["step"].clamp(min=1))
                update = gradient / debiased.sqrt_().add_(c.eps) + group["weight_decay"] * parameter
                state["z"].sub_(update * (group["lr"] * kept))
                share = weight * kept / state["weight"].clamp(min=1e-30)
                self.average[parameter].lerp_(state["z"], share)
                self._mix(parameter)


def parameter_groups(config: AdamWConfig, model: nn.Module, *, names: Container[str] | None = None) -> list[dict[str, Any]]:
    """One group for each distinct rate and decay among the parameters that are trained (those in `names`; None: all)."""
    rate = rates(config, model)
    groups = dict[tuple[float, float], list[Tensor]]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (names is None or name in names):
            decay = config.weight_decay * (_shared(config) / rate[name] if config.compensate_decay else 1.0)
            groups.setdefault((rate[name], decay), []).append(parameter)
    return [{"params": found, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]


def rates(config: AdamWConfig, model: nn.Module) -> dict[str, float]:
    """The base learning rate of every parameter by name."""
    match config.rule:
        case RateRule.mup_report:
            return {name: config.lr / fan for name, fan in fan_ins(model).items()}
        case RateRule.mup:
            grown = growth(model)
            architecture: Any = model.architecture
            ratio = config.base_width / architecture.size.dim
            return {name: _shared(config) / each.multiple(ratio) for name, each in grown.items()}
        case RateRule.constant:
            return {name: config.lr for name, _ in model.named_parameters()}


def _shared(config: AdamWConfig) -> float:
    """The rate of a d x d matrix at d = base_width."""
    return config.lr if config.rule is RateRule.constant else config.lr / config.base_width


def fan_ins(model: nn.Module) -> dict[str, int]:
    """The fan-in of every parameter by name: what its module says in a method `fan_in()`, else what its shape says."""
    return {name: fan_in(parameter) for name, parameter in model.named_parameters()} | stated(model, "fan_in")


def fan_in(parameter: Tensor) -> int:
    """The report's fan-in (spec 1.4): the length of a vector, else the product of all axes but the first."""
    if parameter.ndim < 2:
        return parameter.numel()
    return math.prod(parameter.shape[1:])


def _clean(group: dict[str, Any], optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of `group` that have a gradient, and it, scaled; zeros when any gradient is not finite."""
    for parameter in group["params"]:
        if parameter.grad is not None:
            yield parameter, torch.where(optimizer.found_inf > 0, 0.0, parameter.grad / optimizer.grad_scale)


def _adjusted(adjust: Adjust, rows: int, columns: int) -> float:
    return math.sqrt(max(1.0, rows / columns)) if adjust is Adjust.original else 0.2 * math.sqrt(max(rows, columns))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every group's base rate by the schedule's `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """One update with the global gradient norm limited to `max_norm` (0: unlimited); returns the unclipped norm, on the device.

    A fused optimizer divides by `grad_scale` inside its kernel, which saves a pass over all gradients, and leaves the parameters
    alone when `found_inf` is set, which keeps them good although the host hears of a non-finite gradient only steps later.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    scale = (norm / max_norm).clamp(min=1.0) if max_norm > 0 else torch.ones_like(norm)
    optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
