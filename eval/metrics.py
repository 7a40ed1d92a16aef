"""Metrics of a checkpoint: draw images for the held-out captions, measure them, write the numbers down with their protocol."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hdm.config.amend import amend, check_amendable
from hdm.config.errors import AssetError, ConfigError, DataError, HdmError, suggest
from hdm.config.schema import Metric, RunConfig
from hdm.files import write_json
from hdm.train.recorder import Recorder

if TYPE_CHECKING:
    from eval.measure import Drawn, Measured
    from hdm.train.checkpoint import Loaded

FEWEST = 16  # images: below, a set has no distribution to speak of
_SHOWN = 24  # generated images on the contact sheet, each below its real one


@dataclass(kw_only=True, slots=True, frozen=True)
class _Entry:
    """The module of a metric, with `require(run, **options)` and `measure(drawn, **options)`; whether it looks at images.

    `choice` is the key of `eval` whose value is part of the names of its numbers, `unnamed` are keys that move them and are not.
    """

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    images: bool = True
    choice: str | None = None
    unnamed: tuple[str, ...] = ()


METRICS: dict[Metric, _Entry] = {
    Metric.fid: _Entry(module="eval.distribution", choice="features"),
    Metric.kid: _Entry(module="eval.distribution", options={"kinds": ("kid",)}, choice="features"),
    Metric.prdc: _Entry(module="eval.distribution", options={"kinds": ("prdc",)}, choice="features"),
    Metric.fd: _Entry(module="eval.distribution", options={"kinds": ("fd", "kd")}, choice="features"),
    Metric.fd_dinov2: _Entry(module="eval.distribution", options={"kinds": ("fd", "kd"), "features": "dinov2"}),
    Metric.cmmd: _Entry(module="eval.distribution", options={"kinds": ("cmmd",), "features": "clip"}),
    Metric.clip: _Entry(module="eval.alignment", choice="alignment"),
    Metric.valloss: _Entry(module="eval.valloss", images=False),
    Metric.memorisation: _Entry(module="eval.memorisation", unnamed=("features",)),
    Metric.preference: _Entry(module="eval.preference", choice="preference"),
}


def evaluate(
    ckpt: str | Path,
    metrics: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    recorder: Recorder | None = None,
    weights: str = "ema",
) -> dict[str, float]:
    """The values of `metrics` ("fid", "clip" …) for a run folder or checkpoint, by name such as `kid/efficientnet`.

    `overrides` change how it is sampled and evaluated; the images are drawn once and kept for the next call. Numbers and their
    protocol are written to `eval/` in the run folder and given to `recorder`. Raises CheckpointError, ConfigError, DataError or
    AssetError in one line. Of several processes (torchrun) all draw, the first measures, and the others return {}.
    """
    return measure(load(ckpt, overrides=overrides, weights=weights), metrics, recorder=recorder)


def evaluate_in_training(checkpoint: Path, run: RunConfig, *, recorder: Recorder, samples: int) -> dict[str, float]:
    """The metrics of `run` for a checkpoint that its training has just written, as `eval/kid/efficientnet` at `samples` seen.

    Touches nothing of the training: the network is read from the checkpoint, and randomness is counter-based.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # some libraries draw initial weights from the global generator before they load
        subject = load(checkpoint, overrides=())
        subject.run, subject.during = run, samples
        found = measure(subject, run.eval.metrics, recorder=recorder)
    return {f"eval/{name}": value for name, value in found.items()}


@dataclass(kw_only=True, slots=True)
class Subject:
    """A checkpoint, the weights that were asked for, and the run as it is sampled and evaluated now."""

    loaded: "Loaded"
    weights: str
    run: RunConfig
    preset: str | None = None
    during: int | None = None  # samples seen, for an evaluation in training


def load(ckpt: str | Path, *, overrides: Sequence[str] = (), weights: str = "ema", preset: str | None = None) -> Subject:
    """Read a checkpoint and apply `overrides`, on top of those of a `preset`, to its run."""
    from eval import presets

    check_amendable(overrides)
    lines = presets.lines(preset) if preset else []
    from hdm.train.checkpoint import load_model

    loaded = load_model(ckpt, weights=weights)
    return Subject(loaded=loaded, weights=weights, run=amend(loaded.run, [*lines, *overrides]), preset=preset)


def measure(
    subject: Subject,
    metrics: Sequence[str],
    *,
    recorder: Recorder | None = None,
    skip: bool = False,
    protocols: dict[str, dict[str, Any]] | None = None,
) -> dict[str, float]:
    """See `evaluate`; `skip` passes over metrics whose weights are not here, with a line each.

    `protocols` is given the protocol of each value.
    """
    from eval.threads import one_thread_each

    metrics = _available(subject.run, metrics) if skip else metrics
    require(subject.run, metrics)
    with one_thread_each():
        return _measured(subject, metrics, recorder, protocols if protocols is not None else {})


def _measured(
    subject: Subject, metrics: Sequence[str], recorder: Recorder | None, protocols: dict[str, dict[str, Any]]
) -> dict[str, float]:
    from eval.sampling import rank

    loaded, images = subject.loaded, any(METRICS[Metric(name)].images for name in metrics)
    drawn, sampling = draw(subject) if images else (prepare(subject), {})
    if rank() > 0:
        return {}
    values: dict[str, float] = {}
    title = f"{loaded.folder.name} at {loaded.samples:,} samples, {loaded.weights}" + (f", {drawn.count} images" if images else "")
    table = Table(title=title, title_justify="left")
    for column in ("metric", "value", "± sampling", "protocol"):
        table.add_column(column, justify="right" if column in ("value", "± sampling") else "left")
    for name in metrics:
        entry = METRICS[Metric(name)]
        measured: Measured = importlib.import_module(entry.module).measure(drawn, **entry.options)
        protocol = {"metric": str(name), **(sampling if entry.images else {}), **measured.protocol}
        report = _Report(subject=subject, metric=Metric(name), protocol=protocol, measured=measured)
        report.write()
        if recorder is not None:
            report.record(recorder)
        values |= measured.values
        protocols |= dict.fromkeys(measured.values, protocol)
        for key, value in measured.values.items():
            error = f"{measured.errors[key]:.2g}" if key in measured.errors else ""
            table.add_row(key, f"{value:.5g}", error, report.hash)
    Console(soft_wrap=True).print(table)
    return values


def prepare(subject: Subject) -> "Drawn":
    """What metrics look at, without generated images."""
    from eval.measure import Drawn
    from eval.samples import open_split, read_images
    from eval.sampling import own_device

    run, console = subject.run, Console(stderr=True, soft_wrap=True)
    shards = open_split(run, "val")
    if len(shards) < FEWEST:
        raise DataError(f"{shards.name}: its val split has {len(shards)} images; metrics need {FEWEST} or more")
    real = read_images(run, shards, run.eval.samples, whole=run.eval.whole)
    if not any(caption.strip() for caption in real.captions):
        raise DataError(f"{shards.name}: all captions of its val split are empty, so there is nothing to draw; give it captions")
    return Drawn(run=run, real=real, images=None, device=own_device(run.device), console=console, loaded=subject.loaded)


def draw(subject: Subject) -> tuple["Drawn", dict[str, Any]]:
    """The generated images beside their real ones, and the protocol by which they were drawn."""
    from eval import presets, protocol
    from eval.pictures import Pictures
    from eval.samples import weights_digest
    from eval.sampling import generated
    from hdm.pictures import sheet
    from hdm.train.weak import load_weak

    loaded, run = subject.loaded, subject.run
    drawn = prepare(subject)
    real, console, wanted = drawn.real, drawn.console, run.eval.samples
    if subject.preset and len(real) < presets.PRESETS[subject.preset].prompts:
        needed = presets.PRESETS[subject.preset].prompts
        raise DataError(
            f"protocol={subject.preset}: needs {needed:,} held-out captions and the val split of {run.data} has {len(real):,};"
            " train on a data set that has them, or use protocol=fast_1k"
        )
    if len(real) < wanted:
        how = "each caption is used several times" if run.eval.repeat else "all of them are used"
        console.print(f"eval.samples={wanted}: the val split has {len(real)} images; {how}", highlight=False)
    count = wanted if run.eval.repeat else len(real)
    weak = load_weak(run, device=drawn.device)
    sampling = protocol.sampling_protocol(
        run,
        weights=loaded.weights,
        samples=count,
        size=None if run.eval.whole else real.sizes[0][1:],
        prompts=real.prompts_digest,
        reference=real.digest,
        weak=weights_digest(weak.model) if weak else None,
    )
    folder = loaded.folder / "eval" / protocol.digest(sampling)
    drawn.images = generated(loaded.model, run, real, folder=folder, device=drawn.device, weak=weak, samples=count)
    drawn.folder = folder
    shown = min(_SHOWN, len(real))
    pairs = zip(Pictures.of(real.pixels).first(shown), drawn.pictures.first(shown))
    labels = [label for caption in real.captions[:shown] for label in (f"real: {caption}", "generated")]
    sheet([image for pair in pairs for image in pair], labels, columns=8).save(
        folder / f"{loaded.weights}-{loaded.samples:09d}.png"
    )
    return drawn, sampling


def require(run: RunConfig, metrics: Sequence[str]) -> None:
    """Raise ConfigError or AssetError for what would stop an evaluation of `run`, before any image is drawn or network trained."""
    for name in metrics:
        if name not in set(Metric):
            raise ConfigError(f"eval.metrics: no metric '{name}'{suggest(name, Metric)} (options: {', '.join(Metric)})")
        entry = METRICS[Metric(name)]
        importlib.import_module(entry.module).require(run, **entry.options)
    if metrics and run.eval.samples < FEWEST:
        raise ConfigError(f"eval.samples={run.eval.samples}: is too few; ask for {FEWEST} or more")
    reference = run.eval.reference
    if reference not in ("val", "train") and not reference.endswith(".safetensors"):
        raise ConfigError(f"eval.reference={reference}: is neither val, train nor a file that ends in .safetensors")


def _available(run: RunConfig, metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` whose weights are here; the others are named."""
    found = []
    for name in metrics:
        try:
            require(run, [name])
            found.append(name)
        except AssetError as error:
            Console(stderr=True, soft_wrap=True).print(f"[yellow]eval.{name} is left out[/]: {error}", highlight=False)
    if not found:
        raise HdmError("none of the metrics can be measured here; see the lines above")
    return found


def _label(subject: Subject, unnamed: Sequence[str]) -> str:
    """What sets this evaluation apart from the run's own, which has the plain names: "" for that one."""
    from hdm.train.checkpoint import latest

    loaded, own = subject.loaded, subject.loaded.run
    same = subject.weights == "ema" and _settings(subject.run, unnamed) == _settings(own, unnamed)
    newest = latest(loaded.folder) if (loaded.folder / "checkpoints").is_dir() else None
    last = newest is None or newest.name == f"samples-{loaded.samples:09d}"
    last = last and subject.during is None
    return "" if same and last else "protocol" if last else f"{loaded.samples:09d}"


def _settings(run: RunConfig, unnamed: Sequence[str]) -> tuple[Any, ...]:
    e = run.eval  # its extractor and aligner are part of most metrics' names
    drawn = (run.sampler, run.guidance, run.train.precision, e.samples, e.repeat, e.whole, e.reference, e.seed)
    return *drawn, e.inception, e.clip, e.dinov2, e.judge, *(getattr(e, key) for key in unnamed)


class _Report:
    """The numbers of one metric with what they depend on."""

    def __init__(self, *, subject: Subject, metric: Metric, protocol: dict[str, Any], measured: "Measured") -> None:
        from eval.protocol import digest

        entry, own = METRICS[metric], subject.loaded.run
        label, chosen = _label(subject, entry.unnamed), entry.choice and getattr(subject.run.eval, entry.choice)
        other = chosen and chosen != getattr(own.eval, entry.choice or "")  # another extractor: a file of its own, fid-clip.json
        self.metric = f"{metric}-{chosen}" if other else str(metric)
        self.subject, self.protocol, self.measured = subject, protocol, measured
        self.hash = digest(protocol)
        self.suffix = "" if not label else f".{self.hash}" if label == "protocol" else f".{self.hash}.{label}"
        self.path = subject.loaded.folder / "eval" / f"{self.metric}{self.suffix}.json"

    def write(self) -> None:
        """eval/METRIC.json for the run's own protocol and newest weights, eval/METRIC.PROTOCOL[.SAMPLES].json for others."""
        content = {
            "metrics": self.measured.values,
            "sampling_errors": self.measured.errors,
            "samples": self.subject.loaded.samples,
            "weights": self.subject.loaded.weights,
            "preset": self.subject.preset,
            "protocol_digest": self.hash,
            "protocol": self.protocol,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, content)

    def record(self, recorder: Recorder) -> None:
        """Numbers under another protocol than the run's own get its digest in their names, so that no column mixes two.

        Sampling errors are `eval/error/…`. In training all numbers are `eval/…`, at the samples seen.
        """
        values, errors, during = self.measured.values, self.measured.errors, self.subject.during
        if during is not None:
            recorder.metrics({f"eval/{name}": value for name, value in values.items()}, during)
            recorder.tags({f"protocol.eval.{self.metric}": self.hash})
            return
        named = values | {f"eval/error/{name}": error for name, error in errors.items()}
        recorder.metrics({f"{name}{self.suffix}": value for name, value in named.items()}, None)
        tag = f"protocol.{self.metric}"
        recorder.tags({tag if not self.suffix else f"{tag}{self.suffix}": self.hash})
        recorder.artifact(self.path)
