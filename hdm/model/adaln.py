"""The adaLN axis: how timestep and aspect ratio modulate the sublayers.

Around every sublayer f: h = norm(x) * (1 + scale) + shift, then x + gate * f(h) (report, figure of XUT; spec 1.1). A variant
makes scale, shift and gate of the time embedding, for each sublayer by its name, such as `encoder.0.0.attn`; the last part is its
kind: `attn`, `merge` or `mlp`. Only sublayers that exist are named, so that no parameter lies idle when a merge is not modulated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.axes import ADALN
from hdm.config.registry import option
from hdm.config.schema import RunConfig
from hdm.model.init import Init, normal, zeros
from hdm.model.mapping import Approximator, MappingNetwork


class Gate(Enum):
    """What multiplies the output of a sublayer, given the predicted vector g."""

    one_plus = "one_plus"
    zero = "zero"
    none = "none"


class Triples(Enum):
    """How many (scale, shift, gate) one MLP puts out."""

    network = "network"
    family = "family"
    kind = "kind"


class Activation(Enum):
    """What the time embedding goes through in front of a linear layer that makes modulations."""

    none = "none"
    silu = "silu"


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """What all variants have in common that predict a gate."""

    gate: Gate = option(
        Gate.one_plus, "one_plus: 1 + g (XUT); zero: g, which starts at 0 (adaLN-Zero of DiT, PixArt, LightningDiT); none: 1"
    )


@dataclass(kw_only=True, slots=True)
class SharedConfig(GateConfig):
    """One MLP for each kind of sublayer, shared by all blocks (the report's figure and parameter count)."""


@dataclass(kw_only=True, slots=True)
class SharedMlp1Config(GateConfig):
    """One MLP for the whole network (the report's wording)."""

    triples: Triples = option(
        Triples.network, "network: one for all sublayers; family: one for attention, one for MLP; kind: attn, merge, mlp"
    )


@dataclass(kw_only=True, slots=True)
class SharedOneConfig(GateConfig):
    """One linear layer for the whole network, a triple for each kind of sublayer (DiT-Air, Chen et al., 2025)."""

    activation: Activation = option(Activation.silu, "in front of the layer: silu, as in every published adaLN, or none")


@dataclass(kw_only=True, slots=True)
class PerLayerConfig(GateConfig):
    """One linear layer for each sublayer of each block, starting at zero (DiT, Peebles & Xie, 2023)."""

    activation: Activation = option(Activation.none, "in front of each layer: none (HDM's per-layer mode) or silu (DiT)")


@dataclass(kw_only=True, slots=True)
class NoShiftConfig(GateConfig):
    """As per_layer, without the shift: h = norm(x) * (1 + scale) (LightningDiT's wo_shift, Yao et al., 2025)."""

    activation: Activation = option(Activation.none, "in front of each layer: none, as per_layer has it, or silu (LightningDiT)")


@dataclass(kw_only=True, slots=True)
class ScaleOnlyConfig:
    """h = norm(x) * (1 + W time), no bias, no shift, no gate; sublayers start at zero instead (HDiT's AdaRMSNorm)."""

    gate: Gate = option(Gate.none, "none: 1 (HDiT), and sublayers start at zero; one_plus: the same, times 1 + g; zero: g, from 0")
    mapping: int = option(0, "residual GEGLU layers between the time embedding and all W; 2 in HDiT")
    width: float = option(3.0, "hidden width of these layers over model.dim")

    def check(self, run: RunConfig) -> None:
        """Refuse a mapping network of no size."""
        from hdm.config.check import require

        require(self.mapping >= 0, f"adaln.mapping={self.mapping}: must be 0 or above")
        require(run.model.dim * self.width >= 1, f"adaln.width={self.width}: makes no channels of model.dim={run.model.dim}; use 3")


@dataclass(kw_only=True, slots=True)
class HyperConfig(GateConfig):
    """One residual MLP that makes every vector of every sublayer from the time embedding and the vector's number (Chroma)."""

    width: float = option(1.0, "hidden width over model.dim; 5120 channels in Chroma")
    layers: int = option(5, "residual layers")

    def check(self, run: RunConfig) -> None:
        """Refuse a network of no size."""
        from hdm.config.check import require

        require(run.model.dim * self.width >= 1, f"adaln.width={self.width}: makes no channels of model.dim={run.model.dim}; use 1")
        require(self.layers >= 0, f"adaln.layers={self.layers}: must be 0 or above")


@dataclass(kw_only=True, slots=True)
class SingleConfig(GateConfig):
    """One linear layer for each kind of sublayer, plus a learned offset per sublayer (PixArt's adaLN-single, Chen et al., 2023)."""


@dataclass(kw_only=True, slots=True)
class NoneConfig:
    """No modulation; the time embedding joins the sequence as a token (U-ViT, Bao et al., 2023)."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "the time embedding joins the sequence as a token"}


class Modulation(NamedTuple):
    """What modulates one sublayer; `shift` None is 0, `gate` None is 1."""

    scale: Float[Tensor, "B 1 D"]
    shift: Float[Tensor, "B 1 D"] | None
    gate: Float[Tensor, "B 1 D"] | None


class AdaLN(nn.Module):
    """Predicts the modulation of every sublayer.

    With `as_token` the network appends the time embedding to the sequence instead; with `zero_outputs` the last linear layer of
    every sublayer starts at zero.
    """

    as_token = False
    zero_outputs = False

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """The modulation by the sublayer's name; None leaves the sublayer's normed input and its output as they are."""
        raise NotImplementedError


@ADALN.register("shared", SharedConfig)
class Shared(AdaLN):
    """LayerNorm, Linear(D, 4D), Mish, Linear(4D, 3D) for each kind."""

    def __init__(self, config: SharedConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.gate, self.sublayers = config.gate, sublayers
        self.heads = nn.ModuleDict({kind: _mlp(dim, _vectors(config.gate)) for kind in _kinds(sublayers)})

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {f"heads.{kind}.3.{leaf}": zeros for kind in self.heads for leaf in ("weight", "bias")}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        by_kind = {kind: _split(head(time), self.gate) for kind, head in self.heads.items()}
        return {name: by_kind[_kind(name)] for name in self.sublayers}


@ADALN.register("shared_mlp1", SharedMlp1Config)
class SharedMlp1(AdaLN):
    """The same MLP, once, with one, two or three triples as its output."""

    def __init__(self, config: SharedMlp1Config, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.gate, self.sublayers = config.gate, sublayers
        number = {
            Triples.network: dict.fromkeys(_kinds(sublayers), 0),
            Triples.family: {kind: int(kind.endswith("mlp")) for kind in _kinds(sublayers)},
            Triples.kind: {kind: i for i, kind in enumerate(_kinds(sublayers))},
        }[config.triples]
        self.number = {kind: number[kind] for kind in _kinds(sublayers)}
        self.triples = 1 + max(self.number.values())
        self.mlp = _mlp(dim, _vectors(config.gate) * self.triples)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {f"mlp.3.{leaf}": zeros for leaf in ("weight", "bias")}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        triples = [_split(part, self.gate) for part in self.mlp(time).chunk(self.triples, dim=-1)]
        return {name: triples[self.number[_kind(name)]] for name in self.sublayers}


@ADALN.register("shared_one", SharedOneConfig)
class SharedOne(AdaLN):
    """Linear(D, 3D k) for the k kinds, from zero; the exact form of the layer is taken from DiT's (spec 3)."""

    def __init__(self, config: SharedOneConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.config, self.sublayers, self.kinds = config, sublayers, _kinds(sublayers)
        self.proj = nn.Linear(dim, len(self.kinds) * _vectors(config.gate) * dim)

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"proj.weight": zeros, "proj.bias": zeros}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        raw = self.proj(_active(time, self.config.activation)).chunk(len(self.kinds), dim=-1)
        by_kind = {kind: _split(each, self.config.gate) for kind, each in zip(self.kinds, raw)}
        return {name: by_kind[_kind(name)] for name in self.sublayers}


@ADALN.register("per_layer", PerLayerConfig)
class PerLayer(AdaLN):
    """Linear(D, 3D) for each sublayer (spec 1.2 and 3)."""

    shift = True

    def __init__(self, config: PerLayerConfig | NoShiftConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.gate, self.activation, self.sublayers = config.gate, config.activation, sublayers
        width = _vectors(config.gate, shift=self.shift) * dim
        self.layer = nn.ModuleDict({_key(name): nn.Linear(dim, width) for name in sublayers})

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {f"layer.{key}.{leaf}": zeros for key in self.layer for leaf in ("weight", "bias")}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        active = _active(time, self.activation)
        return {name: _split(self.layer[_key(name)](active), self.gate, shift=self.shift) for name in self.sublayers}


@ADALN.register("no_shift", NoShiftConfig)
class NoShift(PerLayer):
    """Linear(D, 2D) for each sublayer."""

    shift = False


@ADALN.register("scale_only", ScaleOnlyConfig)
class ScaleOnly(AdaLN):
    """Linear(D, D) without bias for each sublayer, starting at zero (spec 3)."""

    def __init__(self, config: ScaleOnlyConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.gate, self.sublayers = config.gate, sublayers
        self.zero_outputs = config.gate is not Gate.zero  # zero times zero would never learn
        self.mapping = MappingNetwork(dim, round(config.width * dim), layers=config.mapping) if config.mapping else None
        width = _vectors(config.gate, shift=False) * dim
        self.layer = nn.ModuleDict({_key(name): nn.Linear(dim, width, bias=False) for name in sublayers})

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {f"layer.{key}.weight": zeros for key in self.layer}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        mapped = time if self.mapping is None else self.mapping(time)
        return {name: _split(self.layer[_key(name)](mapped), self.gate, shift=False) for name in self.sublayers}


@ADALN.register("hyper", HyperConfig)
class Hyper(AdaLN, Approximator):
    """The approximator of the time embedding, which holds the aspect ratio, and of 32 sines and cosines of the vector's number.

    Chroma's has 64 inputs: sinusoids of timestep and guidance, 16 each, in place of the embedding. It is distilled from a trained
    network and frozen when the rest trains; here it trains with the rest.
    """

    def __init__(self, config: HyperConfig, dim: int, sublayers: Sequence[str]) -> None:
        Approximator.__init__(self, dim + 32, round(config.width * dim), dim, layers=config.layers)
        self.gate, self.sublayers = config.gate, sublayers

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN. Vector i of a sublayer, in the order scale, shift, gate, has number v s + i, of v vectors and sublayer s."""
        vectors = _vectors(self.gate)
        number = torch.arange(len(self.sublayers) * vectors, dtype=torch.float64, device=time.device)
        angle = number[:, None] * 1e4 ** -(torch.arange(16, dtype=torch.float64, device=time.device) / 16)
        slot = torch.cat([angle.cos(), angle.sin()], dim=-1).to(time.dtype).expand(len(time), -1, -1)
        raw = self.vectors(torch.cat([time.expand(-1, len(number), -1), slot], dim=-1))
        each = raw.reshape(len(time), len(self.sublayers), -1).chunk(len(self.sublayers), dim=1)
        return {name: _split(vector, self.gate) for name, vector in zip(self.sublayers, each)}


@ADALN.register("single", SingleConfig)
class Single(AdaLN):
    """Linear(D, 3D)(silu(time)) for each kind, std 0.02, plus an offset of 3D for each sublayer, std 1/sqrt(D) (spec 3)."""

    def __init__(self, config: SingleConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.dim, self.gate, self.sublayers = dim, config.gate, sublayers
        width = _vectors(config.gate) * dim
        self.proj = nn.ModuleDict({kind: nn.Linear(dim, width) for kind in _kinds(sublayers)})
        self.offset = nn.ParameterDict({_key(name): nn.Parameter(torch.empty(width)) for name in sublayers})

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        offsets = {f"offset.{key}": normal(self.dim**-0.5) for key in self.offset}
        weights = {f"proj.{kind}.weight": normal(0.02) for kind in self.proj}
        return offsets | weights | {f"proj.{kind}.bias": zeros for kind in self.proj}

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        active = F.silu(time)
        by_kind = {kind: proj(active) for kind, proj in self.proj.items()}
        raw = {name: by_kind[_kind(name)] + self.offset[_key(name)].to(active.dtype) for name in self.sublayers}
        return {name: _split(each, self.gate) for name, each in raw.items()}


@ADALN.register("none", NoneConfig)
class NoAdaLN(AdaLN):
    """See NoneConfig."""

    as_token = True

    def __init__(self, config: NoneConfig, dim: int, sublayers: Sequence[str]) -> None:
        super().__init__()
        self.sublayers = sublayers

    def forward(self, time: Float[Tensor, "B 1 D"]) -> Mapping[str, Modulation | None]:
        """See AdaLN."""
        return dict.fromkeys(self.sublayers)


def _mlp(dim: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, vectors * dim))


def _active(time: Float[Tensor, "B 1 D"], activation: Activation) -> Float[Tensor, "B 1 D"]:
    return F.silu(time) if activation is Activation.silu else time


def _vectors(gate: Gate, *, shift: bool = True) -> int:
    return 1 + shift + (gate is not Gate.none)


def _split(raw: Float[Tensor, "B 1 M"], gate: Gate, *, shift: bool = True) -> Modulation:
    scale, *rest = raw.chunk(_vectors(gate, shift=shift), dim=-1)
    b = rest.pop(0) if shift else None
    return Modulation(scale, b, None if not rest else 1 + rest[0] if gate is Gate.one_plus else rest[0])


def _kind(sublayer: str) -> str:
    return sublayer.rpartition(".")[2]


def _kinds(sublayers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(map(_kind, sublayers)))


def _key(sublayer: str) -> str:
    """Names of submodules must not hold dots."""
    return sublayer.replace(".", "_")
