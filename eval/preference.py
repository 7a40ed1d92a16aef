"""Scores of judges that were trained on what people like: PickScore, or a judge of your own.

usage: python -m eval.preference ckpt=RUN_OR_CHECKPOINT [plugins=[MODULE,...]] [weights=ema|raw|ema_decay] [KEY=VALUE ...]

  python -m eval.preference ckpt=runs/NAME eval.judge=/models/PickScore_v1
  python -m eval.preference ckpt=runs/NAME plugins=[my_lab.aesthetic] eval.preference=my_aesthetic

A judge is a class with `score(images, captions)`, registered by a module that `plugins` names:

  @JUDGES.register("my_aesthetic", MyConfig)
  class MyJudge(Judge): ...

`preference/NAME` is the mean score of the generated images, `…_real` that of the held-out ones.

eval.preference=pickscore    the judge
eval.judge=NAME              its weights: a folder, or a hub name that the local cache holds
eval.samples=512             images
Also: sampler.*, guidance.*, protocol=NAME, device, datasets, cache, track.* (docs/evaluation.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.registry import Axis

if TYPE_CHECKING:
    import torch

    from eval.measure import Drawn, Measured
    from eval.pictures import Pictures
    from hdm.config.schema import EvalConfig, RunConfig


class Judge(ABC):
    """Scores images for captions. Constructed as `Judge(config, options, device)`; raises AssetError when weights are missing."""

    @abstractmethod
    def score(self, images: "Pictures", captions: Sequence[str]) -> "Sequence[float]":
        """One score for each image, higher for a better one."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the protocol says of it: the digest of its weights, how it looks at images."""


JUDGES: Axis[Any] = Axis("eval.preference", "what scores images as people would", default="pickscore")


@dataclass(kw_only=True, slots=True)
class PickScoreConfig:
    """A CLIP that was trained on preferences: its logit scale times the cosine of image and caption (Kirstain et al., 2023)."""


@JUDGES.register("pickscore", PickScoreConfig)
class PickScore(Judge):
    """See PickScoreConfig."""

    def __init__(self, config: PickScoreConfig, options: "EvalConfig", device: "torch.device") -> None:
        from eval.alignment import Clip

        self.clip = Clip(options.judge, device, key="eval.judge")
        self.scale = float(self.clip.model.logit_scale.exp())

    def score(self, images: "Pictures", captions: Sequence[str]) -> "Sequence[float]":
        """See Judge."""
        cosines = (self.clip.embed_images(images, "images") * self.clip.embed_captions(captions)).sum(axis=1)
        return [float(value) for value in self.scale * cosines]

    def facts(self) -> dict[str, Any]:
        """See Judge."""
        from eval.samples import weights_digest

        return {"name": "pickscore", "weights": weights_digest(self.clip.model), "score": "logit scale times cosine"}


def require(run: "RunConfig", **_: Any) -> None:
    """Raise ConfigError for a judge that nobody registered, AssetError when its weights are not here."""
    import torch

    _judge(run.eval, torch.device("cpu"))


def measure(drawn: "Drawn") -> "Measured":
    """`preference/NAME` and `preference/NAME_real`."""
    import numpy as np

    from eval.confidence import error_of_mean
    from eval.measure import Measured
    from eval.pictures import Pictures
    from eval.protocol import versions

    judge, name = _judge(drawn.run.eval, drawn.device), f"preference/{drawn.run.eval.preference}"
    scores = np.asarray(judge.score(drawn.pictures, drawn.captions), dtype=np.float64)
    real = np.asarray(judge.score(Pictures.of(drawn.real.pixels), drawn.real.captions), dtype=np.float64)
    errors = {name: error_of_mean(scores, drawn.weights)} if drawn.weights is not None else {}
    return Measured(
        values={name: float(scores.mean()), f"{name}_real": float(real.mean())},
        errors=errors,
        protocol={"judge": judge.facts(), "versions": versions(["torch", "transformers"])},
    )


def _judge(options: "EvalConfig", device: "torch.device") -> Judge:
    variant = JUDGES.get(options.preference)
    judge: Judge = variant.load()(variant.config(), options, device)
    return judge


def command(arguments: list[str]) -> None:
    """`python -m eval.preference`."""
    from eval.command import run

    run("preference", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
