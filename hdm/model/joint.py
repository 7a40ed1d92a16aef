"""One attention over two streams with weights of their own (MMDiT: Esser et al., 2024; spec 6)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hdm.config.schema import ModelConfig
from hdm.model.attention import Full, Layout, SelfAttention, attend, make_qk_norm, rotate


class TextStream(nn.Module):
    """The text's own projections. With `ends`, text is read for the last time and has neither queries nor an output."""

    output = "out"

    def __init__(self, config: Any, size: ModelConfig, *, ends: bool) -> None:
        super().__init__()
        self.ends = ends
        self.qk_norm = make_qk_norm(config.qk_norm, size)
        if ends and self.qk_norm is not None:
            self.qk_norm.without_queries()
        if ends:
            self.kv = nn.Linear(size.dim, 2 * size.dim, bias=config.qkv_bias)
        else:
            self.qkv = nn.Linear(size.dim, 3 * size.dim, bias=config.qkv_bias)
            self.out = nn.Linear(size.dim, size.dim)

    def parts(self) -> dict[str, int]:
        """See `hdm.train.optimizer`: how many matrices a weight holds, one below the other."""
        return {"kv.weight": 2} if self.ends else {"qkv.weight": 3}

    def project(self, h: Float[Tensor, "B L D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (none of them with `ends`), keys and values."""
        if self.ends:
            k, v = self.kv(h).chunk(2, dim=-1)
            return k[:, :0], k, v
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        return q, k, v


def joint_attention(
    image: SelfAttention, text: TextStream, h: Float[Tensor, "B N D"], h_text: Float[Tensor, "B L D"], layout: Layout
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"] | None]:
    """softmax(q k / sqrt(head_dim)) v over [image, text]; what each stream reads, through its own output layer."""
    assert isinstance(image, Full)  # the configuration refuses every other attention (trait "joint")
    n = h.shape[1]
    streams = []
    for norm, parts in ((image.qk_norm, image.qkv(h).chunk(3, dim=-1)), (text.qk_norm, text.project(h_text))):
        q, k, v = (part.unflatten(-1, (image.heads, -1)).transpose(1, 2) for part in parts)
        streams.append((q, k, v) if norm is None else (*norm(q, k), v))
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams))
    rotation = layout.rotation if image.rope is None else image.rope(layout.position)
    scale = None if image.qk_norm is None else image.qk_norm.scale
    read = (
        attend(rotate(q, rotation, halves=layout.halves), rotate(k, rotation, halves=layout.halves), v, layout.mask, scale=scale)
        .transpose(1, 2)
        .flatten(2)
    )
    return image.out(read[:, :n]), None if text.ends else text.out(read[:, n:])
