"""XUT's tensors under the names of the report author's published checkpoints, and back. The table is data; values pass unchanged.

The published files differ from ours in names only: qkv, kv and w12 are packed in the same order (gate first), `rope.freqs` holds
log-frequencies of (heads, head_dim / 4, 2), and both lay a patch's outputs out as (row, column, channel). One entry is no parameter:
`time_emb.freqs`, the frequencies of the time embedding (spec 1.2).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hdm.config.axes import AXES
from hdm.config.errors import CheckpointError, ConfigError, suggest
from hdm.config.lines import quote
from hdm.config.schema import Final, QKNorm
from hdm.model.adaln import Gate
from hdm.model.backbone import Architecture, Backbone
from hdm.model.encoding import Order, Pairs
from hdm.model.merge import Pairing
from hdm.model.xut import Residual

# Ours, theirs; "#" is a number.
BLOCKS = (
    ("pre.#.", "prev_tread_trns.blocks.#."),
    ("encoder.#.#.", "backbone.enc_blocks.#.#."),
    ("decoder.#.#.", "backbone.dec_blocks.#.#."),
    ("post.#.", "post_tread_trns.blocks.#."),
)
INSIDE_A_BLOCK = (
    ("attn_norm.", "attn_pre_norm.norm."),
    ("attn.", "attn."),
    ("merge_norm.", "xattn_pre_norm.norm."),
    ("merge.attn.", "xattn."),
    ("mlp_norm.", "mlp_pre_norm.norm."),
    ("mlp.", "mlp."),
)
OUTSIDE = (
    ("patch.proj.", "in_patch.proj."),
    ("out.proj.", "out_patch.proj."),
    ("time.proj.", "time_emb.proj.0."),
    ("aspect.up.", "addon_info_embs_proj.0."),
    ("aspect.out.", "addon_info_embs_proj.2."),
    ("text.proj.", "ctx_proj."),
    ("adaln.heads.attn.", "shared_adaln_attn."),
    ("adaln.heads.merge.", "shared_adaln_xattn."),
    ("adaln.heads.mlp.", "shared_adaln_ffw."),
)
PAIRS = OUTSIDE + tuple(
    (own + own_part, their + their_part) for own, their in BLOCKS for own_part, their_part in INSIDE_A_BLOCK
)
TIME_FREQUENCIES = "time_emb.freqs"
PREFIXES = ("unet.model.", "model.", "")  # one-file and training checkpoints, the diffusers layout, the bare network
BESIDE = ("te.", "vae.")  # other networks of a one-file checkpoint

# What the published network is on every axis; what is not named here is free (spec 1.3 a-g).
UPSTREAM: dict[str, tuple[str, dict[str, Any]]] = {
    "backbone": ("xut", {"residual": Residual.normed, "final_norm": False, "final": Final.none}),
    "merge": ("cross", {"pairing": Pairing.deepest, "qk_norm": QKNorm.none}),
    "adaln": ("shared", {"gate": Gate.one_plus}),
    "norm": ("rms", {"affine": True}),
    "attention": ("full", {"qk_norm": QKNorm.none, "qkv_bias": False}),
    "mlp": ("swiglu", {}),
    "position": ("bbox", {}),
    "encoding": (
        "axial_rope",
        {"fraction": 1.0, "learned": True, "order": Order.alternating, "pairs": Pairs.interleaved, "sincos": False},
    ),
    "text_fusion": ("concat", {"norm": False}),
}


def unlike(architecture: Architecture) -> list[tuple[str, str]]:
    """Where `architecture` is not what the published layout can say: pairs of a line of it and the line that would be right."""
    found = []
    for axis, (name, fields) in UPSTREAM.items():
        config = getattr(architecture, axis)
        if (own := AXES[axis].of(config).name) != name:
            found.append((f"{axis}={own}", f"{axis}={name}"))
            continue
        for field, wanted in fields.items():
            if (value := getattr(config, field)) != wanted:
                found.append((f"{axis}.{field}={quote(value)}", f"{axis}.{field}={quote(wanted)}"))
    if (routing := AXES["routing"].of(architecture.routing).name) not in ("tread", "none"):  # the others have parameters
        found.append((f"routing={routing}", "routing=tread"))
    return found


def require_upstream(architecture: Architecture, *, subject: str) -> None:
    """Raise ConfigError, naming every line that differs, unless the published layout can say `architecture`."""
    if differing := unlike(architecture):
        there, wanted = (", ".join(pair[i] for pair in differing) for i in (0, 1))
        raise ConfigError(f"{subject}: the published layout cannot say {there}; it needs {wanted} (preset=xut_upstream)")


def published_name(own: str) -> str | None:
    """The published name of our tensor `own`; None where the layout has none."""
    return _renamed(own, PAIRS)


def own_name(published: str) -> str | None:
    """Our name of the published tensor `published`; None for one that is not of the layout."""
    return _renamed(published, [(their, own) for own, their in PAIRS])


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before every name of the network in a file of the published layout; None for a file of another layout."""
    there = set(names)
    return next((prefix for prefix in PREFIXES if f"{prefix}in_patch.proj.weight" in there), None)


def to_published(tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under their published names. Raises CheckpointError for one that the layout has no name for."""
    found = {}
    for own, tensor in tensors.items():
        name = published_name(own)
        if name is None:
            raise CheckpointError(f"'{own}': the published layout has no such tensor; it is XUT of preset=xut_upstream")
        found[prefix + name] = tensor
    weight = tensors["time.proj.weight"]
    found[prefix + TIME_FREQUENCIES] = time_frequencies(weight.shape[1]).to(weight.dtype)
    return found


def from_published(tensors: Mapping[str, Tensor], model: Backbone, *, source: str, strict: bool = True) -> dict[str, Tensor]:
    """The tensors of a published file under our names, for `model`, which may be on the meta device.

    Raises ConfigError where `model` is another kind of network, and CheckpointError, in one line that calls the file `source`, for
    the first tensor that is unknown, missing or of another shape. Without `strict` only those that fit are returned.
    """
    require_upstream(model.architecture, subject=source)
    prefix = prefix_of(tensors)
    if prefix is None:
        raise CheckpointError(f"{source}: has no in_patch.proj.weight; it is no checkpoint of the published layout")
    wanted = {name: parameter.shape for name, parameter in model.state_dict().items()}
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or name.startswith(BESIDE):
            continue
        short = name.removeprefix(prefix)
        if short == TIME_FREQUENCIES:
            _check_frequencies(tensor, source=f"{source}: '{name}'")
            continue
        own = own_name(short)
        if own is not None and own in wanted and tensor.shape == wanted[own]:
            found[own] = tensor
        elif strict:
            raise CheckpointError(f"{source}: {_misfit(name, tensor, own, wanted)}")
    missing = next((name for name in wanted if name not in found), None)
    if strict and missing is not None:
        raise CheckpointError(f"{source}: '{prefix}{published_name(missing)}' is missing; the file is of a smaller network, or cut off")
    return found


def time_frequencies(dim: int) -> Tensor:
    """exp(-ln(1e4) k / (d/2)) of the time embedding, (1, d/2), float32 (spec 1.2)."""
    half = dim // 2
    return torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float64) / half).float()[None]


def _check_frequencies(tensor: Tensor, *, source: str) -> None:
    """They are computed here, so a file must agree with the equation, with or without its factor of 1000."""
    expected = time_frequencies(2 * tensor.shape[-1])
    found = tensor.float().reshape(1, -1)
    if not any(torch.allclose(found, expected * factor, rtol=4e-3, atol=1e-6 * factor) for factor in (1, 1000)):
        raise CheckpointError(f"{source} holds other frequencies than exp(-ln(1e4) k / (d/2)); it is of another time embedding")


def _misfit(name: str, tensor: Tensor, own: str | None, wanted: Mapping[str, torch.Size]) -> str:
    if own is None or own not in wanted:
        known = [their for their in map(published_name, wanted) if their]
        return f"'{name}' is not of this network{suggest(name, known)}; it is deeper, or not of the published layout"
    shapes = f"{tuple(tensor.shape)} there and {tuple(wanted[own])} in the network"
    if tuple(tensor.shape) == tuple(reversed(wanted[own])):
        return f"'{name}' is transposed: {shapes}; save it as (out, in)"
    return f"'{name}' has shape {shapes}; set the sizes of the file: model.dim, model.mlp_dim, model.heads, model.head_dim"


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if match := re.match(re.escape(old).replace(r"\#", r"(\d+)"), name):
            numbers = iter(match.groups())
            return re.sub("#", lambda _, numbers=numbers: next(numbers), new) + name[match.end() :]
    return None
