"""Two conditions in one forward pass, and the arithmetic of two predictions."""

import torch
from jaxtyping import Float
from torch import Tensor

from hdm.model.backbone import Backbone, Condition


def both_passes(
    model: Backbone, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], condition: Condition, null: Condition
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """The velocities under `condition` and under `null`, float32, from one forward pass."""
    both = model(torch.cat([x, x]), torch.cat([t, t]), stack(condition, null))
    conditional, unconditional = both.float().chunk(2)
    return conditional, unconditional


def stack(first: Condition, second: Condition) -> Condition:
    """Both conditions as one batch; the shorter text is padded and masked."""
    length = max(first.text.shape[1], second.text.shape[1])
    texts, masks = zip(*(_padded(c, length) for c in (first, second)))
    unmasked = first.text_mask is None and second.text_mask is None and first.text.shape[1] == second.text.shape[1]
    return Condition(
        text=torch.cat(texts),
        text_mask=None if unmasked else torch.cat(masks),
        position=torch.cat([first.position, second.position]),
        aspect=torch.cat([first.aspect, second.aspect]),
    )


def _padded(condition: Condition, length: int) -> tuple[Tensor, Tensor]:
    text, mask = condition.text, condition.text_mask
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    missing = length - text.shape[1]
    return torch.nn.functional.pad(text, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


def extrapolate(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale (strong - weak)."""
    return torch.lerp(weak, strong, scale)


def projection(v: Float[Tensor, "B C H W"], onto: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """<v, onto> / |onto|^2 onto, sample by sample; 0 onto 0."""
    dot, square = (v * onto).sum((1, 2, 3), keepdim=True), onto.square().sum((1, 2, 3), keepdim=True)
    return dot / square.clamp_min(torch.finfo(square.dtype).tiny) * onto
