"""Train, sample, evaluate and track one configuration.

usage: python -m hdm.run [experiment=NAME] [KEY=VALUE ...] [--dry-run] [--print-config]

  python -m hdm.run                                      the quick start: experiment=openmoji_nano, minutes on a CPU
  python -m hdm.run merge=concat routing.rate=0.25       another merge strategy, another TREAD rate
  python -m hdm.run merge=concat match=params            the same, with an MLP that makes up for the parameters
  python -m hdm.run experiment=xut_base_full --dry-run   what the report's training costs, before it costs anything

A run is a folder below `out=runs`, named by a digest of what it computes: the same command continues it after any interruption, and
does nothing when it is finished. Ctrl-C saves. --print-config prints every key with its value, as one would type it.
What can be set: python -m hdm.variants [AXIS | experiments | keys].
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hdm import cli
from hdm.config.schema import Resume, RunConfig
from hdm.files import locked, write_json

if TYPE_CHECKING:
    from hdm.track.events import EventLog


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a run. `status` is finished or interrupted."""

    folder: Path
    status: str
    metrics: dict[str, float] = field(default_factory=dict)


def command(arguments: list[str]) -> int:
    """Compose, then plan, print or execute."""
    from hdm.config.compose import DEFAULT_EXPERIMENT, compose, flatten
    from hdm.config.lines import quote
    from hdm.model.match import matched

    dry_run = cli.take_flag(arguments, "--dry-run")
    print_config = cli.take_flag(arguments, "--print-config")
    run = matched(compose(arguments, default_experiment=DEFAULT_EXPERIMENT))
    if print_config:
        for key, value in flatten(run).items():
            print(f"{key}={quote(value)}")
        return 0
    if dry_run:
        from hdm.plan import print_plan

        print_plan(run)
        return 0
    return 0 if execute(run).status == "finished" else 130


def execute(run: RunConfig) -> Outcome:
    """Train `run`, matched already, in its folder, or continue it; evaluate it; ship everything to the tracking server."""
    from eval import metrics as evaluation
    from hdm.config import compat
    from hdm.config.check import require
    from hdm.config.compose import flatten
    from hdm.config.identity import run_name
    from hdm.track.events import EventLog, redact
    from hdm.train.budget import limits
    from hdm.train.parallel import processes

    limits(run.budget, may_be_none=bool(run.stages))
    if run.eval.metrics:
        evaluation.require(run, run.eval.metrics)  # missing weights show now, not after the night
    folder = Path(run.out) / run_name(run)
    if processes()[0] > 0:
        return _assisted(run, folder)
    require(run.resume is Resume.auto or not folder.exists(), f"resume=never: {folder} exists; give the run another name= or seed=")
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is training this run; wait for it, or give this one a name= or seed="
    with locked(folder / "lock", busy=busy):
        if (done := finished(folder)) is not None:
            print(f"{folder} is finished already; nothing to do (another seed= or name= starts a new run)")
            for line in _reevaluation(run, folder):
                print(line)
            return done
        flat = {key: redact(value) if isinstance(value, str) else value for key, value in flatten(run).items()}
        write_json(folder / "config.json", flat)
        recorder = EventLog(folder)
        recorder.params(flat)
        for line in (*filter(None, [run.matched]), *compat.adapters(run)):
            print(line)
        return _tracked(run, folder, recorder)


def _assisted(run: RunConfig, folder: Path) -> Outcome:
    """What a process but the first does: it trains, and leaves words and files to that one."""
    from hdm.train.loop import train
    from hdm.train.recorder import Silent

    if finished(folder) is not None:
        return Outcome(folder=folder, status="finished")
    return Outcome(folder=folder, status=train(run, folder, Silent()).status)


def finished(folder: Path) -> Outcome | None:
    """The outcome of a run that has completed everything, else None; one with a damaged result is evaluated again."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return Outcome(folder=folder, status=result["status"], metrics=result["metrics"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        print(f"warning: {folder / 'result.json'} is damaged; the run is evaluated and ended again", file=sys.stderr)
        return None


def _reevaluation(run: RunConfig, folder: Path) -> list[str]:
    """The commands that evaluate a finished run as it is asked for now, where that differs from how it was evaluated."""
    from hdm.config.compose import flatten
    from hdm.config.lines import quote

    then, now = json.loads((folder / "config.json").read_text(encoding="utf-8")), flatten(run)
    changed = [key for key in now if key.startswith(("eval.", "sampling.")) and now[key] != then.get(key)]
    options = " ".join(f"{key}={quote(now[key])}" for key in changed if key not in ("eval.metrics", "eval.initial"))
    return [f"evaluate it as asked now: python -m eval.{name} ckpt={folder} {options}" for name in run.eval.metrics if changed]


def _tracked(run: RunConfig, folder: Path, recorder: "EventLog") -> Outcome:
    from eval.metrics import evaluate_in_training
    from hdm.plan import planned
    from hdm.track.mlflow import tracking
    from hdm.train.loop import train

    with tracking(run, folder, recorder) as tracker:
        result = train(
            run, folder, recorder, evaluate=lambda path, own, n: evaluate_in_training(path, own, recorder=recorder, samples=n)
        )
        metrics = dict(result.metrics)
        if result.status == "finished" and (expected := planned(run, metrics)):
            recorder.metrics(expected, None)
            metrics |= expected
            print(f"planned {expected['cost/planned_hours']:.3g} h, trained {metrics['cost/seconds'] / 3600:.3g} h")
        if result.status == "finished" and run.eval.metrics:
            metrics |= _evaluated(run, folder, recorder)
        tracker.finish(result.status)
        if result.status == "finished":
            write_json(folder / "result.json", {"status": result.status, "samples": result.samples, "metrics": metrics})
    print(tracker.farewell())
    return Outcome(folder=folder, status=result.status, metrics=metrics)


def _evaluated(run: RunConfig, folder: Path, recorder: "EventLog") -> dict[str, float]:
    """The metrics of the trained weights, and with `eval.initial` those of the initial ones as `initial/…`."""
    from eval.metrics import evaluate

    metrics: dict[str, float] = {}
    if run.eval.initial:
        untrained = min((folder / "checkpoints").glob("samples-*"))
        metrics |= {f"initial/{name}": value for name, value in evaluate(untrained, run.eval.metrics).items()}
        recorder.metrics(metrics, None)
    return metrics | evaluate(folder, run.eval.metrics, recorder=recorder)


if __name__ == "__main__":
    cli.main(command, __doc__)
