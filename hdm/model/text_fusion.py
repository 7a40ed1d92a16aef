"""The text fusion axis: how text states meet image tokens."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hdm.config.axes import TEXT_FUSION
from hdm.config.registry import option
from hdm.model.backbone import Condition


@dataclass(kw_only=True, slots=True)
class ConcatConfig:
    """Text tokens follow the image tokens through every block and share all weights with them (report, "Minimal Architecture")."""

    takes: ClassVar[dict[str, str]] = {"image_sequence": "text tokens follow the image tokens through every block"}

    mask: bool = option(True, "no token attends to padding; false attends to it, as the upstream code does (spec 1.3 o)")


class TextFusion(nn.Module):
    """Makes text tokens of the text states."""

    def forward(self, condition: Condition) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"] | None]:
        """The tokens that join the sequence, and which of them are real; None when all are."""
        raise NotImplementedError


@TEXT_FUSION.register("concat", ConcatConfig)
class Concat(TextFusion):
    """One linear layer, no norm (spec 1.2)."""

    def __init__(self, config: ConcatConfig, context_dim: int, dim: int) -> None:
        super().__init__()
        self.mask = config.mask
        self.proj = nn.Linear(context_dim, dim)

    def forward(self, condition: Condition) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"] | None]:
        """See TextFusion."""
        mask = condition.text_mask if self.mask else None
        # A mask that hides nothing costs attention its fastest kernels. Asking an accelerator would wait for it.
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        return self.proj(condition.text.to(self.proj.weight.dtype)), mask
