"""Metrics of a checkpoint: draw images for the held-out captions, measure them, write the numbers down with their protocol."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hdm.config.amend import amend, check_amendable
from hdm.config.errors import ConfigError, DataError, suggest
from hdm.config.schema import Metric, RunConfig
from hdm.files import write_json
from hdm.train.recorder import Recorder

if TYPE_CHECKING:
    from eval.measure import Drawn, Measured
    from hdm.train.checkpoint import Loaded

FEWEST = 16  # images: below, a set has no distribution to speak of
_SHOWN = 24  # generated images on the contact sheet, each below its real one


def evaluate(
    ckpt: str | Path,
    metrics: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    recorder: Recorder | None = None,
    weights: str = "ema",
) -> dict[str, float]:
    """The values of `metrics` ("fid", "clip") for a run folder or checkpoint, by name such as `kid/efficientnet`.

    `overrides` change how it is sampled and evaluated; the images are drawn once and kept for the next call. Numbers and their
    protocol are written to `eval/` in the run folder and given to `recorder`. Raises CheckpointError, ConfigError, DataError or
    AssetError in one line.
    """
    return measure(load(ckpt, overrides=overrides, weights=weights), metrics, recorder=recorder)


@dataclass(kw_only=True, slots=True)
class Subject:
    """A checkpoint, the weights that were asked for, and the run as it is sampled and evaluated now."""

    loaded: "Loaded"
    weights: str
    run: RunConfig


def load(ckpt: str | Path, *, overrides: Sequence[str] = (), weights: str = "ema") -> Subject:
    """Read a checkpoint and apply `overrides` to its run."""
    check_amendable(overrides)
    from hdm.train.checkpoint import load_model

    loaded = load_model(ckpt, weights=weights)
    return Subject(loaded=loaded, weights=weights, run=amend(loaded.run, overrides))


def measure(subject: Subject, metrics: Sequence[str], *, recorder: Recorder | None = None) -> dict[str, float]:
    """See `evaluate`."""
    require(subject.run, metrics)
    loaded = subject.loaded
    drawn, sampling = _draw(loaded, subject.run)
    label = _label(subject)
    values: dict[str, float] = {}
    title = f"{loaded.folder.name} at {loaded.samples:,} samples, {loaded.weights}, {len(drawn.real)} images"
    table = Table(title=title, title_justify="left")
    for column in ("metric", "value", "protocol"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name in metrics:
        measured: Measured = _module(name).measure(drawn)
        protocol = {"metric": str(name), **sampling, **measured.protocol}
        report = _Report(loaded=loaded, metric=str(name), protocol=protocol, values=measured.values, label=label)
        report.write()
        if recorder is not None:
            report.record(recorder)
        values |= measured.values
        for key, value in measured.values.items():
            table.add_row(key, f"{value:.5g}", report.hash)
    Console(soft_wrap=True).print(table)
    return values


def _draw(loaded: "Loaded", run: RunConfig) -> tuple["Drawn", dict[str, Any]]:
    """The generated images beside their real ones, and the protocol by which they were drawn."""
    from eval import protocol
    from eval.measure import Drawn
    from eval.samples import generated, open_split, read_images, weights_digest
    from hdm.pictures import sheet
    from hdm.train.loop import pick_device
    from hdm.train.weak import load_weak

    console, device = Console(stderr=True, soft_wrap=True), pick_device(run.device)
    shards, wanted = open_split(run, "val"), run.eval.samples
    if len(shards) < FEWEST:
        raise DataError(f"{shards.name}: its val split has {len(shards)} images; metrics need {FEWEST} or more")
    if len(shards) < wanted:
        console.print(f"eval.samples={wanted}: the val split has {len(shards)} images; all of them are used", highlight=False)
    real = read_images(run, shards, wanted)
    weak = load_weak(run, device=device)
    sampling = protocol.sampling_protocol(
        run,
        weights=loaded.weights,
        samples=len(real),
        size=real.size,
        prompts=real.prompts_digest,
        reference=real.digest,
        weak=weights_digest(weak.model) if weak else None,
    )
    folder = loaded.folder / "eval" / protocol.digest(sampling)
    images = generated(loaded.model, run, real, folder=folder, device=device, weak=weak)
    import torch

    pairs = torch.stack([real.pixels[:_SHOWN], images[:_SHOWN]], dim=1).flatten(0, 1)
    labels = [label for caption in real.captions[:_SHOWN] for label in (f"real: {caption}", "generated")]
    sheet(pairs, labels, columns=8).save(folder / f"{loaded.weights}-{loaded.samples:09d}.png")
    return Drawn(run=run, real=real, images=images, device=device, console=console), sampling


def require(run: RunConfig, metrics: Sequence[str]) -> None:
    """Raise ConfigError or AssetError for what would stop an evaluation of `run`, before any image is drawn or network trained."""
    for name in metrics:
        if name not in set(Metric):
            raise ConfigError(f"eval.metrics: no metric '{name}'{suggest(name, Metric)} (options: {', '.join(Metric)})")
        _module(name).require(run)
    if metrics and run.eval.samples < FEWEST:
        raise ConfigError(f"eval.samples={run.eval.samples}: is too few; ask for {FEWEST} or more")


def _module(metric: str) -> Any:
    """The module of a metric: its `require` and `measure`."""
    return importlib.import_module({Metric.fid: "eval.distribution", Metric.clip: "eval.alignment"}[Metric(metric)])


def _label(subject: Subject) -> str:
    """What sets this evaluation apart from the run's own, which has the plain names: "" for that one."""
    from hdm.train.checkpoint import latest

    loaded, own = subject.loaded, subject.loaded.run
    same = subject.weights == "ema" and _settings(subject.run) == _settings(own)
    newest = latest(loaded.folder) if (loaded.folder / "checkpoints").is_dir() else None
    last = newest is None or newest.name == f"samples-{loaded.samples:09d}"
    return "" if same and last else "protocol" if last else f"{loaded.samples:09d}"


def _settings(run: RunConfig) -> tuple[Any, ...]:
    e = run.eval  # its extractor and aligner are part of the metrics' names
    return run.sampler, run.guidance, run.train.precision, e.samples, e.seed, e.inception, e.clip


class _Report:
    """The numbers of one metric with what they depend on."""

    def __init__(self, *, loaded: "Loaded", metric: str, protocol: dict[str, Any], values: dict[str, float], label: str) -> None:
        from eval.protocol import digest

        self.loaded, self.metric, self.protocol, self.values = loaded, metric, protocol, values
        self.hash = digest(protocol)
        self.suffix = "" if not label else f".{self.hash}" if label == "protocol" else f".{self.hash}.{label}"
        self.path = loaded.folder / "eval" / f"{metric}{self.suffix}.json"

    def write(self) -> None:
        """eval/METRIC.json for the run's own protocol and newest weights, eval/METRIC.PROTOCOL[.SAMPLES].json for others."""
        content = {
            "metrics": self.values,
            "samples": self.loaded.samples,
            "weights": self.loaded.weights,
            "protocol_digest": self.hash,
            "protocol": self.protocol,
        }
        write_json(self.path, content)

    def record(self, recorder: Recorder) -> None:
        """Numbers under another protocol than the run's own get its digest in their names, so that no column mixes two."""
        recorder.metrics({f"{name}{self.suffix}": value for name, value in self.values.items()}, None)
        if not self.suffix:
            recorder.tags({f"protocol.{self.metric}": self.hash})
        recorder.artifact(self.path)
