"""Every axis of the laboratory, in the order in which a run uses them: the table of contents.

A variant's file says `from hdm.config.axes import MERGE` and registers below its config (see `hdm.config.registry`). The names here
are the groups of the command line (`merge=concat`) and fields of `hdm.config.schema.RunConfig`.
"""

import importlib.util
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from hdm.config.deferred import declare
from hdm.config.registry import Axis

BACKBONE: Axis[Any] = Axis("backbone", "the network that predicts the velocity", default="xut")
MERGE: Axis[Any] = Axis("merge", "how a decoder stage takes in its encoder state", default="cross")
ADALN: Axis[Any] = Axis("adaln", "how timestep and aspect ratio modulate the sublayers", default="shared")
NORM: Axis[Any] = Axis("norm", "what stands in front of every sublayer", default="rms")
ATTENTION: Axis[Any] = Axis("attention", "how the tokens of a block attend to each other", default="full")
MLP: Axis[Any] = Axis("mlp", "the position-wise network of a block", default="swiglu")
POSITION: Axis[Any] = Axis("position", "the position map: the coordinates of every image token", default="rect1")
ENCODING: Axis[Any] = Axis("encoding", "how positions enter the network", default="axial_rope")
ROUTING: Axis[Any] = Axis("routing", "which image tokens bypass the middle of the network in training", default="tread")
TEXT_FUSION: Axis[Any] = Axis("text_fusion", "how text states meet image tokens", default="concat")

TEXT_ENCODER: Axis[Any] = Axis("text_encoder", "the frozen network that turns captions into states", default="qwen3")
AUTOENCODER: Axis[Any] = Axis("autoencoder", "the frozen network between pixels and latents", default="kl")

DATA: Axis[Any] = Axis("data", "the captioned images", default="openmoji")
CROP: Axis[Any] = Axis("crop", "how images of any aspect ratio become a batch", default="shifted_square", common=("size",))

OBJECTIVE: Axis[Any] = Axis("objective", "what the network is trained to predict", default="velocity")
ALIGNMENT: Axis[Any] = Axis("alignment", "what else the network's tokens are drawn to in training", default="none")
TEACHER: Axis[Any] = Axis("teacher", "the frozen image network of an alignment loss", default="dinov2")
TIMESTEP: Axis[Any] = Axis("timestep", "the law of the training timestep", default="logit_normal")
SAMPLER: Axis[Any] = Axis("sampler", "the integrator from noise (t=1) to image (t=0)", default="euler")
GUIDANCE: Axis[Any] = Axis("guidance", "how the sampled velocity is steered", default="cfg")

OPTIMIZER: Axis[Any] = Axis("optimizer", "the update rule and its learning-rate rule per tensor", default="adamw")
SCHEDULE: Axis[Any] = Axis("schedule", "the learning rate over the run", default="cosine")

AXES: dict[str, Axis[Any]] = {axis.name: axis for axis in list(globals().values()) if isinstance(axis, Axis)}

_PACKAGES = ("hdm.model", "hdm.conditioning", "hdm.data", "hdm.diffusion", "hdm.train")


@cache
def discover() -> dict[str, Axis[Any]]:
    """Declare every variant that the package carries and return the axes by name. Imports no torch; runs once."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        for module in pkgutil.walk_packages(spec.submodule_search_locations, package + "."):
            path = Path(module.module_finder.path) / f"{module.name.rpartition('.')[2]}.py"  # type: ignore[union-attr]
            if not module.ispkg and "hdm.config.axes" in path.read_text(encoding="utf-8"):
                declare(module.name)
    return AXES
