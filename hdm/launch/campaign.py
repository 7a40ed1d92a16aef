"""A sweep from the first arm to the table: start what is not finished, survive what fails, rank, and keep the result."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hdm.config.errors import TrackingError
from hdm.config.schema import RunConfig
from hdm.files import locked, write_json
from hdm.launch import champion, pictures, record, view
from hdm.launch.arm import Arm, adopted, mark, sweep_name, sweep_tag
from hdm.launch.grammar import SweepAxis, values_of
from hdm.launch.job import ArmJob
from hdm.launch.launcher import Job, Launcher
from hdm.launch.options import Cluster, Search, SweepOptions
from hdm.launch.search import Explorer
from hdm.launch.study import Study
from hdm.track import environment
from hdm.track.browse import browse
from hdm.track.events import EventLog, redact
from hdm.track.mlflow import Shipper
from hdm.track.replay import sync
from hdm.track.replica import reason, say
from hdm.track.uri import alone, connect, fragment, resolve

if TYPE_CHECKING:
    from hdm.launch.ranking import Ranking

_POLL = 0.5  # seconds
_GRACE = 120.0  # seconds for interrupted arms to save
_STATE = "arms.json"


@dataclass(kw_only=True, slots=True)
class Sweep:
    """A checked sweep, ready to run. A search has no arms before it runs; `run` is what its settings start from."""

    arms: list[Arm]
    axes: dict[str, SweepAxis]
    fixed: list[str]
    seeds: list[int]
    run: RunConfig
    options: SweepOptions
    file: str = ""
    command: str = ""
    name: str = field(init=False)
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        about = [*self.fixed, *map(repr, self.axes.values()), self.options.search.name, self.options.metric, *map(str, self.seeds)]
        keys = [self.file or "-".join([self.options.search.name, *self.axes])] if self.file or not self.arms else []
        self.name = sweep_name(self.arms, keys=keys, about=about)
        self.folder = Path(self.run.out) / "sweeps" / self.name


def execute(sweep: Sweep, *, show: bool = False) -> int:
    """Run what is not finished, rank everything; return 0, or 1 if an arm failed, or 130 when interrupted.

    `show` opens the comparison in the person's browser at the end.
    """
    run = sweep.run
    sweep.folder.mkdir(parents=True, exist_ok=True)
    busy = f"{sweep.folder}: another launcher runs this sweep; wait for it or stop it"
    with locked(sweep.folder / "lock", busy=busy), contextlib.ExitStack() as held:
        campaign = Campaign(sweep)
        held.enter_context(_undivided(sweep))
        shipper = Shipper(sweep.folder, uri=run.track.uri, experiment=run.track.experiment, run_name=sweep.name)
        log = EventLog(sweep.folder)
        log.params(_params(sweep))
        log.tags({sweep_tag(sweep.name): "sweep"})
        environment.record(log)
        log.artifact(record.write(sweep))
        log.status("running")
        _prepare(run)
        with shipper:
            _run_arms(sweep, campaign)
            log.artifact(record.write(sweep))  # with the arms that a search has made
            states = campaign.states
            ranking = _report(sweep, states, log)
            failed = sum(status == "failed" for status, _ in states.values())
            interrupted = any(status in ("interrupted", "waiting", "running") for status, _ in states.values())
            status = "interrupted" if interrupted else "failed" if failed else "finished"
            log.status(status, f"{failed} of {len(states)} arms failed" if failed else "")
        _send_arms(sweep)
    page = view.page(sweep, shipper, ranking) if ranking else {}
    crowned = champion.crown(sweep, ranking) if ranking and not interrupted else []
    for line in (*crowned, *shipper.link(**page), *view.pictures(sweep, shipper)):
        print(line)
    if interrupted:
        print(f"interrupted; go on with: {sweep.command}")
    uri, experiment, _ = shipper.place
    if show and experiment:
        browse(uri, fragment(experiment, **page))
    return 130 if interrupted else 1 if failed else 0


def _undivided(sweep: Sweep) -> contextlib.AbstractContextManager[None]:
    """A grid whose study is in a database has one launcher at a time, wherever it is; those of a search share its trials."""
    storage = sweep.options.storage
    if storage is None or sweep.options.search is not Search.grid:
        return contextlib.nullcontext()
    busy = f"storage={redact(storage)}: another launcher runs this sweep; wait for it, or give each a part, such as other seeds"
    return alone(storage, task=sweep.name, busy=busy)


class Campaign:
    """The arms on their way through the launcher."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        options = sweep.options
        self.launcher = _launcher(sweep)
        self.study: Study | None = None
        self.explorer: Explorer | None = None
        if options.search is Search.grid:
            axes = values_of(sweep.axes.values()) | ({"seed": [str(seed) for seed in sweep.seeds]} if options.seeds else {})
            more: dict[str, Any] = {"storage": options.storage, "sweep": sweep.name}
            self.study = Study(sweep.folder, axes=axes, metric=options.metric, direction=options.direction.name, **more)
        else:
            self.explorer = Explorer(sweep.folder, name=sweep.name, axes=sweep.axes.values(), fixed=sweep.fixed, options=options)
        self.states: dict[str, tuple[str, str]] = {}
        self.jobs: dict[str, Job] = {}
        self.stopping = False
        self._pruned: set[str] = set()
        self._kept = _kept(sweep.folder)

    def begin(self) -> None:
        """Take over what earlier launchers left: arms that are finished, jobs that are queued or run, failures that are to stay."""
        if self.explorer:
            self._take(self.explorer.begin())
        else:
            arms, self.sweep.arms = self.sweep.arms, []
            self._take(arms)

    def step(self) -> list[tuple[Arm, str]]:
        """Hear what has ended and start what there is room for; return the arms whose status changed."""
        before = dict(self.states)
        for arm in self.sweep.arms:
            if self.states[arm.label][0] == "running":
                self._look_after(arm)
        if not self.stopping:
            self._submit()
        changed = [(arm, self.states[arm.label][0]) for arm in self.sweep.arms if before.get(arm.label) != self.states[arm.label]]
        if self.explorer:
            self.explorer.beat()
        if changed:
            self._keep()
        return changed

    def active(self) -> bool:
        """Whether anything is running or will be."""
        busy = ("running",) if self.stopping else ("running", "waiting")
        if any(status in busy for status, _ in self.states.values()):
            return True
        return not self.stopping and self.explorer is not None and self.explorer.waits()

    def stop(self) -> None:
        """Let the running arms save and leave; start no others."""
        self.stopping = True
        for arm in self.sweep.arms:
            if self.states[arm.label][0] == "running":
                self.jobs[arm.label].stop()

    def close(self) -> None:
        """Let go of the processes; those that still run go on."""
        self.jobs.clear()
        self.launcher.close()

    def _take(self, arms: list[Arm]) -> None:
        """Make `arms` part of the sweep, each in the state that it is found in. A search may propose a setting twice."""
        for arm in arms:
            if arm.label in self.states:
                status, _ = self.states[arm.label]
                if self.explorer and status in ("finished", "failed", "pruned"):
                    self.explorer.ended(arm, status)
                continue
            self.sweep.arms.append(arm)
            self.states[arm.label] = ("waiting", "")
            kept = self._kept.get(arm.label, {})
            job = self.launcher.attach(kept["job"]) if kept.get("job") else None
            if progress_of(arm) == "finished":
                mark(arm.folder, self.sweep.name, setting=arm.setting)
                self._end(arm, "finished", "")
            elif kept.get("status") == "pruned" or (kept.get("status") == "failed" and not self.sweep.options.retry_failed):
                self._end(arm, kept["status"], kept["reason"])
            elif job is not None and not (job.done() and self.sweep.options.retry_failed):  # else how it ended is still to be heard
                self.jobs[arm.label], self.states[arm.label] = job, ("running", "")

    def _submit(self) -> None:
        waiting = [arm for arm in self.sweep.arms if self.states[arm.label][0] == "waiting"]
        room = self.launcher.room()
        if self.explorer:
            # the next proposals know more when they are made later
            busy = sum(status in ("running", "waiting") for status, _ in self.states.values())
            room = min(room, (self.sweep.options.parallel or room) - busy + len(waiting), _WIDEST)
            while len(waiting) < room and (more := self.explorer.more()) is not None:
                self._take(more)
                waiting = [arm for arm in self.sweep.arms if self.states[arm.label][0] == "waiting"]
        chosen = waiting[: max(0, room)]
        if not chosen:
            return
        name = self.sweep.name
        calls = [
            ArmJob(overrides=adopted(arm, name), folder=str(arm.folder), sweep=name, setting=arm.setting, environment={})
            for arm in chosen
        ]
        for arm, job in zip(chosen, self.launcher.submit(calls)):
            self.jobs[arm.label], self.states[arm.label] = job, ("running", "")

    def _look_after(self, arm: Arm) -> None:
        job = self.jobs[arm.label]
        if not job.done():
            if self.explorer and not self.stopping and arm.label not in self._pruned and self.explorer.falls_behind(arm):
                self._pruned.add(arm.label)
                job.stop()
            return
        result = job.result()
        status, why = result["status"], f"{result['reason']} (log: {job.log})" if result["reason"] else ""
        if status == "interrupted" and arm.label in self._pruned:
            status = "pruned"
        elif status == "interrupted" and not self.stopping and self.sweep.options.launcher is Cluster.slurm:
            status = "waiting"  # the cluster took its nodes away and did not queue it again
        self._end(arm, status, why)

    def _end(self, arm: Arm, status: str, why: str) -> None:
        self.states[arm.label] = (status, why)
        self.jobs.pop(arm.label, None)
        if self.explorer:
            if status in ("finished", "failed", "pruned"):
                self.explorer.ended(arm, status)
        elif self.study and status == "finished":
            metrics = arm.outcome.metrics if arm.outcome else {}
            self.study.tell(arm.point, metrics.get(self.sweep.options.metric, math.nan))
        elif self.study and status == "failed":
            self.study.tell(arm.point, None)

    def _keep(self) -> None:
        """Write down what another launcher must know."""
        content = {}
        for arm in self.sweep.arms:
            status, why = self.states[arm.label]
            job = self.jobs[arm.label].record() if arm.label in self.jobs else None
            if status in ("failed", "pruned") or job:
                content[arm.label] = {"status": status, "reason": why, "job": job}
        write_json(self.sweep.folder / _STATE, content)


_WIDEST = 16  # trials of a search at once where neither parallel= nor the machine says


def _launcher(sweep: Sweep) -> Launcher:
    options = sweep.options
    if options.launcher is Cluster.slurm:
        from hdm.launch.slurm import SlurmLauncher

        return SlurmLauncher(sweep.folder / "jobs", options.parallel, options=options.job, name=sweep.name)
    from hdm.launch.local import LocalLauncher

    return LocalLauncher(sweep.folder / "jobs", options.parallel, tasks=options.job.tasks)


def _kept(folder: Path) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads((folder / _STATE).read_text(encoding="utf-8")))
    return {}


def _prepare(run: RunConfig) -> None:
    """Make the tracking database, where it is missing, before many processes ask for it at once."""
    uri = resolve(run.track.uri)
    if uri is None or uri.startswith("http"):
        return
    try:
        connect(uri)
    except Exception as error:  # tracking never costs a run
        say(f"{reason(error)}; the sweep goes on without")


def _run_arms(sweep: Sweep, campaign: Campaign) -> None:
    """Run every arm that is not finished. Ctrl-C and SIGTERM let the running ones save and start no others."""
    from rich.console import Console

    from hdm.launch.progress import SweepProgress

    console = Console(highlight=False)
    deadline = math.inf
    campaign.begin()
    with SweepProgress(sweep.arms, console=console) as progress, _Interrupts() as interrupts:
        for arm in sweep.arms:
            progress.set(arm, campaign.states[arm.label][0])
        first = True
        while (first or campaign.active()) and interrupts.count < 2 and time.monotonic() < deadline:
            first = False
            for arm, status in campaign.step():
                progress.set(arm, status)
            progress.update()
            if interrupts.count and not campaign.stopping:
                console.print("interrupted: the arms save and leave; Ctrl-C again does not wait for them", style="yellow")
                campaign.stop()
                deadline = time.monotonic() + _GRACE
            if campaign.active():
                time.sleep(_POLL)
    campaign.close()


class _Interrupts:
    """Counts SIGINT and SIGTERM while the context is open, so that neither strikes between starting an arm and knowing it."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_Interrupts":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def _report(sweep: Sweep, states: Mapping[str, tuple[str, str]], log: EventLog) -> "Ranking | None":
    """Rank, print, and keep with the sweep's own run."""
    from rich.console import Console

    from hdm.launch.noise import noise_floor
    from hdm.launch.ranking import Ranking, Row, count_parameters

    finished = [arm for arm in sweep.arms if states[arm.label][0] == "finished"]
    parameters = count_parameters(finished)
    rows = [Row.of(arm, *states[arm.label], parameters=parameters.get(arm.label)) for arm in sweep.arms]
    if not rows:
        print("no arm was made")
        return None
    options = sweep.options
    noise, why = noise_floor(sweep)
    judging: dict[str, Any] = {"direction": options.direction.name, "baseline": options.baseline, "alpha": options.alpha}
    ranking = Ranking(rows, metric=options.metric, noise=noise, **judging)
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(ranking.table())
    for row in rows:
        if row.status == "failed":
            print(f"failed: {row.arm.label}: {row.reason}")
    for problem in filter(None, (ranking.missing(), why)):
        print(problem)
    shown = pictures.write(ranking, sweep.folder)
    for path in (*ranking.write(sweep.folder), *shown):
        log.artifact(path)
    tables = ["table.json", *([pictures.FILE] if shown else [])]
    log.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in tables])})
    log.metrics(ranking.summary(), None)
    return ranking


def _send_arms(sweep: Sweep) -> None:
    """See to it that every arm is on the server, also those that finished while it was down or before this sweep."""
    uri = resolve(sweep.run.track.uri)
    for arm in sweep.arms if uri else []:
        if not (arm.folder / "events.jsonl").exists():
            continue
        try:
            sync(arm.folder, uri=uri or "", experiment=sweep.run.track.experiment)
        except TrackingError as error:
            print(f"tracking: {error}", file=sys.stderr)
            return


def progress_of(arm: Arm) -> str:
    """What there is of an arm: nothing yet, some or all of it."""
    if arm.outcome is not None:
        return "finished"
    return "begun" if (arm.folder / "config.json").exists() else "new"


def _params(sweep: Sweep) -> dict[str, str]:
    options = sweep.options
    params = {f"sweep.{key}": ", ".join(values) for key, values in values_of(sweep.axes.values()).items()}
    params |= {"sweep.seeds": ", ".join(map(str, sweep.seeds)), "sweep.metric": options.metric}
    params |= {"sweep.direction": options.direction.name, "sweep.search": options.search.name}
    params |= {"sweep.arms": str(len(sweep.arms) or f"{options.trials} trials"), "sweep.fixed": " ".join(sweep.fixed)}
    # the last two are for hdm.sync
    return params | {"experiment": sweep.run.experiment, "track.experiment": sweep.run.track.experiment, "track.name": sweep.name}
