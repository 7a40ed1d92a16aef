"""The other network of guidance=autoguidance, from its checkpoint."""

import torch

from hdm.config.errors import CheckpointError
from hdm.config.schema import RunConfig
from hdm.diffusion.generate import Network
from hdm.diffusion.guidance import AutoguidanceConfig
from hdm.train.checkpoint import load_model


def load_weak(run: RunConfig, *, device: torch.device | str) -> Network | None:
    """What guidance.ckpt names, for `Generator`; None when the guidance is another one.

    Raises CheckpointError, in one line, for a checkpoint that is not there or is damaged.
    """
    if not isinstance(run.guidance, AutoguidanceConfig):
        return None
    ckpt = str(run.guidance.ckpt)
    try:
        loaded = load_model(ckpt, weights=run.guidance.weights.name, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"guidance.ckpt={ckpt}: {str(error).removeprefix(f'ckpt={ckpt}: ')}") from None
    return Network(model=loaded.model, run=loaded.run)
