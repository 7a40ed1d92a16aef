"""Validation loss of a checkpoint: the same held-out images, noise and timesteps for every run, nothing routed.

usage: python -m eval.valloss ckpt=RUN_OR_CHECKPOINT [weights=ema|raw|ema_decay|ema:WIDTH] [KEY=VALUE ...]

  python -m eval.valloss ckpt=runs/openmoji_nano-s0-1f0c77ab
  python -m eval.valloss ckpt=runs/openmoji_nano-s0-1f0c77ab weights=raw

`loss/velocity` is the mean squared error of the velocity, the `val/loss` of training; `loss/unconditional` the same with the empty
caption; `loss/text` the difference, what the captions are worth. No image is drawn.

Also: eval.bootstrap, train.precision, device, datasets, cache, track.* (docs/evaluation.md). How many images and timesteps are
looked at belongs to the run: validation.samples, validation.timesteps.
"""

from typing import TYPE_CHECKING, Any

from hdm import cli

if TYPE_CHECKING:
    from eval.measure import Drawn, Measured
    from hdm.config.schema import RunConfig


def require(run: "RunConfig", **_: Any) -> None:
    """Nothing is needed but the run itself."""


def measure(drawn: "Drawn") -> "Measured":
    """`loss/velocity`, `loss/unconditional` and `loss/text`."""
    from eval import confidence
    from eval.measure import Measured
    from eval.protocol import versions
    from eval.samples import open_split
    from hdm.config.axes import OBJECTIVE
    from hdm.config.errors import HdmError
    from hdm.train.examples import Examples
    from hdm.train.validation import Validation

    run, loaded = drawn.run, drawn.loaded
    if loaded is None:
        raise HdmError("eval.valloss: needs a checkpoint, images alone have no loss")
    shards = open_split(run, "val")
    validation = Validation(run, shards, Examples(run, drawn.device), OBJECTIVE.build(run.objective))
    model = loaded.model.to(drawn.device)
    losses = validation.losses(model).mean(dim=1)
    unconditional = validation.losses(model, unconditional=True).mean(dim=1)
    series = {"loss/velocity": losses, "loss/unconditional": unconditional, "loss/text": unconditional - losses}
    rounds = run.eval.bootstrap
    errors = {}
    if rounds > 1:
        drawn_again = confidence.weights(len(losses), rounds)
        errors = {name: confidence.error_of_mean(values.numpy(), drawn_again) for name, values in series.items()}
    protocol = {
        "data": shards.digest,
        "size": run.crop.size,
        "images": len(losses),
        "timesteps": run.validation.timesteps,
        "precision": run.train.precision.name,
        "weights": loaded.weights,
        "ema": {"ema-power": run.ema.power, "ema-decay": run.ema.decay}.get(loaded.weights),
        "versions": versions(["torch", "pillow"]),
    }
    return Measured(values={name: float(values.mean()) for name, values in series.items()}, errors=errors, protocol=protocol)


def command(arguments: list[str]) -> None:
    """`python -m eval.valloss`."""
    from eval.command import run

    run("valloss", arguments)


if __name__ == "__main__":
    cli.main(command, __doc__)
