"""The encoding axis: how positions enter the network.

Every scheme consumes the position map (y, x), so crops and aspect ratios need no special case. Text tokens lie at (0, 0), which
rotary encoding turns by nothing, and absolute encodings are added to image tokens only (NoPE for text, spec 5), unless a variant's
`text` says otherwise. Scales are relative to a square image, whichever interval the map lays it over: a number means the same under
any map.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from hdm.config.axes import ENCODING
from hdm.config.registry import option
from hdm.config.schema import ModelConfig, RunConfig
from hdm.config.traits import declared
from hdm.model.angles import lang, sincos_table, token_numbers, turn
from hdm.model.init import Init, normal, uniform, values


class Spacing(Enum):
    """Rotary frequencies, or their initial values when they are learned."""

    log = "log"
    log_open = "log_open"
    constant = "constant"
    lang = "lang"


class Order(Enum):
    """Which axis the rotating channel pairs of a head belong to."""

    alternating = "alternating"
    blocks = "blocks"


class Pairs(Enum):
    """Which of the rotating channels form a pair."""

    interleaved = "interleaved"
    half_split = "half_split"


class TextPosition(Enum):
    """How text tokens turn."""

    nope = "nope"
    index = "index"


@dataclass(kw_only=True, slots=True)
class TokenUnitConfig:
    """What the schemes have in common whose unit is a token."""

    base: int = option(16, "tokens along the side of a square image; one token is one unit of the phase")

    def check(self, run: RunConfig) -> None:
        """Refuse a grid of no size, and one beside the grid of the position map."""
        from hdm.config.check import require

        require(self.base > 0, f"encoding.base={self.base}: must be above 0")
        mapped = getattr(run.position, "base", self.base)
        require(
            mapped == self.base,
            f"encoding.base={self.base}: position.base={mapped} counts the same tokens; set both to one number",
        )


@dataclass(kw_only=True, slots=True)
class AxialRopeConfig(TokenUnitConfig):
    """Rotary encoding of y and x, each by its own channel pairs, on a part of each head (report; RoFormer, Su et al., 2021)."""

    base: int = option(16, "tokens along the side of a square image; the unit of spacing=lang and of `sincos`, and of nothing else")
    fraction: float = option(0.5, "part of the head's channels that rotates; 0.5 in the report and HDiT, 1 upstream and in EVA")
    learned: bool = option(False, "learn the log-frequencies, per layer and head")
    spacing: Spacing = option(
        Spacing.log,
        "log: from low to high, every head its own; log_open: the same up to, not including, high (HDiT); constant: all at low, as"
        " upstream's start; lang: theta^(-k/K) a token, k = 0 … K-1, in every head (EVA, LightningDiT)",
    )
    low: float = option(1.0, "slowest frequency, in turns over a square image; 1 means pi per unit under bbox, 2 pi under rect1")
    high: float = option(5.0, "fastest frequency, in the same unit; 10 in HDiT")
    theta: float = option(1e4, "of spacing=lang")
    order: Order = option(Order.alternating, "pairs of y and x alternate (XUT), or blocks: those of y, then those of x (HDiT, EVA)")
    pairs: Pairs = option(
        Pairs.interleaved, "pairs are channels (2i, 2i + 1) (XUT, EVA), or half_split: (i, i + P) of 2P that rotate (HDiT)"
    )
    sincos: bool = option(False, "add the table of sincos_abs to the image tokens as well (LightningDiT)")

    def check(self, run: RunConfig) -> None:
        """Refuse a fraction that cannot be dealt to pairs on two axes, and frequencies that are no frequencies."""
        from hdm.config.check import require

        channels = run.model.head_dim * self.fraction
        require(
            0 < self.fraction <= 1 and channels % 4 == 0,
            f"encoding.fraction={self.fraction}: turns {channels:g} of model.head_dim={run.model.head_dim} channels;"
            " choose a fraction in (0, 1] that turns a multiple of 4",
        )
        require(0 < self.low <= self.high, f"encoding.low={self.low}: must be above 0 and at most encoding.high={self.high}")
        require(self.theta > 0, f"encoding.theta={self.theta}: must be above 0")
        if self.spacing is Spacing.lang or self.sincos:
            TokenUnitConfig.check(self, run)


@dataclass(kw_only=True, slots=True)
class FluxRopeConfig(TokenUnitConfig):
    """Rotary encoding of three axes, (0, y, x), on 1/8, 7/16 and 7/16 of each head, by theta^(-k/K) a token (Flux, 2024)."""

    theta: float = option(1e4, "ratio of the fastest to the frequency after the slowest")
    text: TextPosition = option(
        TextPosition.nope, "nope: text at (0, 0, 0) (Flux, Chroma); index: token j at (j + 1, 0, 0) (Lumina)"
    )

    def check(self, run: RunConfig) -> None:
        """Refuse heads that cannot be dealt to pairs on three axes."""
        from hdm.config.check import require

        TokenUnitConfig.check(self, run)
        require(self.theta > 0, f"encoding.theta={self.theta}: must be above 0")
        require(
            self.text is TextPosition.nope or "text_sequence" not in declared(type(run.text_fusion), "takes"),
            f"encoding.text={self.text.name}: numbers text tokens, and no text token is in the sequence; use encoding.text=nope, or"
            " text_fusion=concat",
        )
        require(
            run.model.head_dim % 4 == 0 and run.model.head_dim >= 8,
            f"model.head_dim={run.model.head_dim}: encoding=flux_rope needs a multiple of 4, 8 or above",
        )


@dataclass(kw_only=True, slots=True)
class SincosAbsConfig(TokenUnitConfig):
    """Fixed sines and cosines of x and y, added to the image tokens (ViT-MAE, DiT)."""

    def check(self, run: RunConfig) -> None:
        """Refuse a width that cannot be split into sine and cosine of two axes."""
        from hdm.config.check import require

        TokenUnitConfig.check(self, run)
        require(run.model.dim % 4 == 0, f"model.dim={run.model.dim}: encoding=sincos_abs needs a multiple of 4")


@dataclass(kw_only=True, slots=True)
class LearnedAbsConfig:
    """A learned table, read bilinearly at each position and added to the image tokens (U-ViT; extension as in minRF)."""

    base: int = option(16, "table cells along the side of a square image")
    extent: float = option(2.0, "side of the table over that of a square image: 2 holds aspect ratios up to 4:1 under rect1")
    text: int = option(0, "learned vectors for as many text tokens too, 77 in U-ViT; later ones get the last")

    def check(self, run: RunConfig) -> None:
        """Refuse a table that does not hold a square image."""
        from hdm.config.check import require

        require(self.base > 0, f"encoding.base={self.base}: must be above 0")
        require(self.extent >= 1, f"encoding.extent={self.extent}: must be 1 or above, or the table does not hold a square image")
        require(self.text >= 0, f"encoding.text={self.text}: must be 0 or above")
        require(
            not self.text or "text_sequence" not in declared(type(run.text_fusion), "takes"),
            f"encoding.text={self.text}: numbers text tokens, and no text token is in the sequence; use encoding.text=0, or"
            " text_fusion=concat",
        )


@dataclass(kw_only=True, slots=True)
class CoordChannelsConfig:
    """The coordinates of each token as two more input channels of its patch (Patch Diffusion, Wang et al., 2023)."""


@dataclass(kw_only=True, slots=True)
class NopeConfig:
    """No encoding: image tokens know their place from nothing but their content."""


class Encoding(nn.Module):
    """A scheme overrides the one way in which it enters; `square` is the interval (low, high) that a square image covers.

    With `halves` the channel pairs that turn are (i, i + P), the first 2P channels of a head rotating, in place of (2i, 2i + 1).
    """

    halves = False

    def __init__(self, config: object, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__()
        self.middle, self.side = (square[0] + square[1]) / 2, square[1] - square[0]

    def embed(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"] | None:
        """What is added to the image tokens at the input, before routing."""
        return None

    def embed_text(self, tokens: int) -> Float[Tensor, "L D"] | None:
        """What is added to that many text tokens at the input."""
        return None

    def rotation(self, position: Float[Tensor, "B T 2"], images: int | None = None) -> Complex[Tensor, "B H T P"] | None:
        """exp(i angle) of each channel pair, shared by all layers and computed once per forward pass.

        The first `images` tokens are image tokens, the others text; None: all are image tokens.
        """
        return None

    def per_layer(self) -> nn.Module | None:
        """A new module for one attention layer that makes a rotation of positions."""
        return None


@ENCODING.register("axial_rope", AxialRopeConfig)
class AxialRope(Encoding):
    """Pair 2k + a of a head turns by frequency k of that head times coordinate a (0: y, 1: x); in blocks it is pair a K + k."""

    def __init__(self, config: AxialRopeConfig, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__(config, size, square)
        self.config, self.heads, self.dim = config, size.heads, size.dim
        self.count = int(size.head_dim * config.fraction) // 4
        self.halves = config.pairs is Pairs.half_split

    def embed(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"] | None:
        """See Encoding."""
        if not self.config.sincos:
            return None
        return sincos_table(token_numbers(position, self.middle, self.side, self.config.base), self.dim)

    def rotation(self, position: Float[Tensor, "B T 2"], images: int | None = None) -> Complex[Tensor, "B H T P"] | None:
        """See Encoding."""
        if self.config.learned:
            return None
        return turn(position, self.log_frequencies(position.device).to(position.dtype), blocks=self.config.order is Order.blocks)

    def per_layer(self) -> nn.Module | None:
        """See Encoding."""
        return LearnedFrequencies(self) if self.config.learned else None

    def log_frequencies(self, device: torch.device | str = "cpu") -> Float[Tensor, "H K 2"]:
        """Logarithms of the frequencies, in radians per unit of the map, dealt round-robin to the heads; lang: the same for all."""
        count, c = self.count * self.heads, self.config
        low, high = (math.log(turns * 2 * math.pi / self.side) for turns in (c.low, c.high))
        match c.spacing:
            case Spacing.lang:
                low = math.log(c.base / self.side)
                ramp = low + lang(self.count, c.theta, device).repeat_interleave(self.heads)
            case Spacing.log_open:
                ramp = torch.linspace(low, high, count + 1, dtype=torch.float64, device=device)[:-1]
            case _:
                high = low if c.spacing is Spacing.constant else high
                ramp = torch.linspace(low, high, count, dtype=torch.float64, device=device)
        return ramp.view(self.count, self.heads).T[..., None].expand(-1, -1, 2)


class LearnedFrequencies(nn.Module):
    """The log-frequencies of one attention layer."""

    def __init__(self, rope: AxialRope) -> None:
        super().__init__()
        self.start, self.blocks = rope.log_frequencies, rope.config.order is Order.blocks
        self.freqs = nn.Parameter(torch.empty(rope.heads, rope.count, 2))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"freqs": values(self.start().float().numpy())}

    def forward(self, position: Float[Tensor, "B T 2"]) -> Complex[Tensor, "B H T P"]:
        """The rotation at these positions."""
        return turn(position, self.freqs, blocks=self.blocks)


@ENCODING.register("flux_rope", FluxRopeConfig)
class FluxRope(Encoding):
    """Pairs in blocks, one an axis, the same in every head: 16, 56 and 56 of 128 channels. Frequencies are per token."""

    def __init__(self, config: FluxRopeConfig, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__(config, size, square)
        self.config, self.heads = config, size.heads
        first = 4 * math.ceil(size.head_dim / 32)  # an eighth, and a multiple of 4 so that the rest can be halved
        self.channels = [first, (size.head_dim - first) // 2, (size.head_dim - first) // 2]

    def rotation(self, position: Float[Tensor, "B T 2"], images: int | None = None) -> Complex[Tensor, "B H T P"] | None:
        """See Encoding. Image tokens have number 0 on the first axis; text numbers from 1, so that padding changes none."""
        number = torch.zeros_like(position[..., 0])
        if self.config.text is TextPosition.index and images is not None:
            number[:, images:] = torch.arange(1, number.shape[1] - images + 1, dtype=number.dtype, device=number.device)
        y, x = (position * (self.config.base / self.side)).unbind(-1)
        angles = [
            axis[..., None] * lang(channels // 2, self.config.theta, position.device).exp().to(position.dtype)
            for axis, channels in zip((number, y, x), self.channels)
        ]
        angle = torch.cat(angles, dim=-1)[:, None].expand(-1, self.heads, -1, -1)
        return torch.complex(angle.cos(), angle.sin())


@ENCODING.register("sincos_abs", SincosAbsConfig)
class SincosAbs(Encoding):
    """The table of the positions in tokens. With position=integer and its interpolation it is PixArt's."""

    def __init__(self, config: SincosAbsConfig, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__(config, size, square)
        self.base, self.dim = config.base, size.dim

    def embed(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"] | None:
        """See Encoding."""
        return sincos_table(token_numbers(position, self.middle, self.side, self.base), self.dim)


@ENCODING.register("learned_abs", LearnedAbsConfig)
class LearnedAbs(Encoding):
    """A table of (side, side) cells centred on the middle of a square image; beyond its border the outermost cell counts."""

    def __init__(self, config: LearnedAbsConfig, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__(config, size, square)
        self.extent, side = config.extent, round(config.base * config.extent)
        self.table = nn.Parameter(torch.empty(size.dim, side, side))
        self.text = nn.Parameter(torch.empty(config.text, size.dim)) if config.text else None

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"table": normal(0.02)} | ({} if self.text is None else {"text": normal(0.02)})

    def embed(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"] | None:
        """All positions of the batch are read as one column, so that the table is not repeated per image."""
        xy = (position - self.middle).flip(-1) * (2 / self.side / self.extent)
        read = F.grid_sample(
            self.table[None], xy.to(self.table.dtype).reshape(1, -1, 1, 2), padding_mode="border", align_corners=False
        )
        return read[0, :, :, 0].T.view(*position.shape[:2], -1)

    def embed_text(self, tokens: int) -> Float[Tensor, "L D"] | None:
        """See Encoding."""
        if self.text is None:
            return None
        return self.text[torch.arange(tokens, device=self.text.device).clamp(max=len(self.text) - 1)]


@ENCODING.register("coord_channels", CoordChannelsConfig)
class CoordChannels(Encoding):
    """The patch embedding's weights for the two more channels, (D, 2, p, p), which hold (y, x) in [-1, 1] over a square image.

    A coordinate is that of the patch's centre on all of its pixels. A convolution is linear in its input, so these channels add a
    term of their own to the tokens, and the weights for the latents stay those of every other network of the seed.
    """

    def __init__(self, config: CoordChannelsConfig, size: ModelConfig, square: tuple[float, float]) -> None:
        super().__init__(config, size, square)
        self.weight = nn.Parameter(torch.empty(size.dim, 2, size.patch, size.patch))

    def initial(self) -> dict[str, Init]:
        """See `hdm.model.init`."""
        return {"weight": uniform(1 / math.sqrt(self.weight[0].numel()))}

    def embed(self, position: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"] | None:
        """See Encoding."""
        coordinate = (position - self.middle) * (2 / self.side)
        return F.linear(coordinate.to(self.weight.dtype), self.weight.sum(dim=(2, 3)))


@ENCODING.register("nope", NopeConfig)
class Nope(Encoding):
    """See NopeConfig."""
