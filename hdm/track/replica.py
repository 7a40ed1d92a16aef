"""From the event log to MLflow, so that nothing is lost or doubled however often a run, a server or this process dies.

Events are sent in order, and the number of the last one that arrived is kept as a tag of the MLflow run (`hdm.shipped`), in the
same request as the data. What was sent without being acknowledged is sent again, and everything sent is harmless to repeat: a
metric carries the time at which it was recorded, and (key, step, time, value) is one row in MLflow's store; parameters, tags, files
and data sets replace themselves; an image is looked for first. Of a metric that a resumed run tells again, the first telling
counts, on every server.

The MLflow run is found by its tag `hdm.run_id`, made of the run folder's name and the random number in the log's first line.
"""

import json
import re
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import TrackingError
from hdm.files import locked, write_json
from hdm.track.events import Event, numbers, read, redact, tail
from hdm.track.uri import connect, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID, SHIPPED, REASON, PARENT = "hdm.run_id", "hdm.shipped", "hdm.reason", "mlflow.parentRunId"
STATE = "shipped.json"
MAX_METRICS, MAX_PARAMS, MAX_TAGS, MAX_VALUE = 1000, 100, 100, 6000  # of one log_batch
MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Replica:
    """One run folder's copy on one server.

    `parent` is the run folder of the parent, relative to the folder that holds this run, or the id of an MLflow run.
    """

    _offset: int
    _pending: deque[Event]

    def __init__(self, folder: Path, *, uri: str, experiment: str, run_name: str = "", parent: str | None = None) -> None:
        self.folder, self.uri, self.experiment = Path(folder), uri, experiment
        self.run_name, self.parent = run_name or self.folder.name, parent
        self._key = f"{redact(uri)} {experiment}"
        self._client: MlflowClient | None = None
        self._run_id, self._experiment_id = "", ""
        self._shipped = -1
        self._forget()

    def ship(self) -> int:
        """Send what the log holds beyond what the server has; return the number of events sent.

        Raises what MLflow raises when the server does not take it.
        """
        count = 0
        with locked(self.folder / f"{STATE}.lock"):
            client = self._client or self._open()
            known = read_state(self.folder).get(self._key, {}).get("seq", -1)
            self._shipped = max(self._shipped, known)  # another process may have sent some
            events, self._offset = tail(self.folder, self._offset)
            self._pending += events
            try:
                while self._pending:
                    batch = self._next_batch()
                    self._send(client, batch)
                    count += len(batch.events)
            except BaseException:
                self._client = None  # the next call asks the server how far it is
                raise
        return count

    def open(self) -> str:
        """The id of the MLflow run, which is created where it is missing."""
        with locked(self.folder / f"{STATE}.lock"):
            if self._client is None:
                self._open()
        return self._run_id

    @property
    def location(self) -> tuple[str, str]:
        """(experiment id, run id) on the server; empty before anything was sent."""
        return self._experiment_id, self._run_id

    # --- the run on the server

    def _forget(self) -> None:
        """Start over with the log; what the server has is remembered while reading up to the last event that it has."""
        self._offset = 0
        self._pending = deque()
        self._points: set[tuple[str, int]] = set()  # (metric, step)
        self._summaries: dict[str, float] = {}
        self._params: set[str] = set()
        self._excused = False  # whether a reason was given for an earlier status
        self._images: set[tuple[str, int]] | None = None

    def _open(self) -> "MlflowClient":
        identity = run_identity(self.folder)
        client = connect(self.uri)
        self._experiment_id = experiment_id(client, self.experiment, self.uri)
        run = self._find(client, identity) or self._create(client, identity)
        self._run_id, self._shipped = run.info.run_id, int(run.data.tags.get(SHIPPED, -1))
        self._forget()
        self._save()
        self._client = client
        return client

    def _find(self, client: "MlflowClient", identity: str) -> "Run | None":
        found = client.search_runs([self._experiment_id], f"tags.`{RUN_ID}` = '{identity}'", max_results=1)
        return found[0] if found else None

    def _create(self, client: "MlflowClient", identity: str) -> "Run":
        tags = {RUN_ID: identity}
        if parent := self._parent_id():
            tags[PARENT] = parent
        start = read(self.folder)[0].time
        return client.create_run(self._experiment_id, start_time=int(start * 1000), tags=tags, run_name=self.run_name)

    def _parent_id(self) -> str | None:
        if self.parent is None:
            return None
        folder = self.folder.parent / self.parent
        if not read(folder):
            return self.parent
        return Replica(folder, uri=self.uri, experiment=self.experiment).open()

    # --- sending

    def _next_batch(self) -> "_Batch":
        """As many of the pending events as fit into one request."""
        batch = _Batch()
        while self._pending and batch.has_room():
            event = self._pending.popleft()
            if event.seq > self._shipped:
                batch.events.append(event)
                self._fill(batch, event)
            self._remember(event)
        return batch

    def _remember(self, event: Event) -> None:
        """The server has `event`: know it, so that a repetition is not sent."""
        match event.type:
            case "metrics" if event.data["samples"] is None:
                self._summaries.update(numbers(event))
            case "metrics":
                self._points.update((key, event.data["samples"]) for key in event.data["values"])
            case "params":
                self._params.update(event.data["values"])
            case "status":
                self._excused |= bool(event.data["reason"])

    def _fill(self, batch: "_Batch", event: Event) -> None:
        """Put what of `event` is new into `batch`."""
        from mlflow.entities import Metric, Param, RunTag

        stamp = int(event.time * 1000)
        match event.type:
            case "metrics" | "system":
                step = event.data["samples"] if event.type == "metrics" else event.data["seconds"]
                for key, value in numbers(event).items():
                    if not self._is_known(key, value, step):
                        batch.metrics.append(Metric(_name(key), value, stamp, step or 0))
            case "params":
                new = {key: value for key, value in event.data["values"].items() if key not in self._params}
                batch.params += [Param(_name(key), _text(value)) for key, value in new.items()]
            case "tags":
                batch.tags |= {key: RunTag(_name(key), value[:MAX_VALUE]) for key, value in event.data["values"].items()}
            case "status":
                batch.status = (MLFLOW_STATUS[event.data["status"]], stamp)
                if event.data["reason"] or self._excused:  # a run that went on after all is no longer blamed
                    batch.tags[REASON] = RunTag(REASON, event.data["reason"][:MAX_VALUE] or "-")
            case "image" | "artifact" | "dataset":
                batch.files.append(event)

    def _is_known(self, key: str, value: float, step: int | None) -> bool:
        """Whether the server has the metric; a summary of a key that has a curve is that curve's last point."""
        if step is None:
            return self._summaries.get(key) == value or any(known == key for known, _ in self._points)
        return (key, step) in self._points

    def _send(self, client: "MlflowClient", batch: "_Batch") -> None:
        """Send `batch`; the request that carries the last of the data also says how far we are."""
        from mlflow.entities import RunTag

        if not batch.events:
            return
        for event in batch.files:
            self._send_file(client, event)
        if batch.status:
            status, stamp = batch.status
            if status == "RUNNING":
                client.update_run(self._run_id, status=status)
            else:
                client.set_terminated(self._run_id, status=status, end_time=stamp)
        last = batch.events[-1].seq
        tags = [*batch.tags.values(), RunTag(SHIPPED, str(last))]
        params, metrics = batch.params, batch.metrics
        while len(params) > MAX_PARAMS or len(metrics) + len(params) + len(tags) > MAX_METRICS:
            client.log_batch(self._run_id, params=params[:MAX_PARAMS], metrics=metrics[: MAX_METRICS - MAX_PARAMS])
            params, metrics = params[MAX_PARAMS:], metrics[MAX_METRICS - MAX_PARAMS :]
        client.log_batch(self._run_id, metrics=metrics, params=params, tags=tags)
        self._shipped = last
        self._save()

    def _send_file(self, client: "MlflowClient", event: Event) -> None:
        data = event.data
        if event.type == "dataset":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                data["name"], data["digest"][:36], "hdm", json.dumps({"name": data["name"], "digest": data["digest"]})
            )
            client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", data["context"])])])
            return
        path = self.folder / data["path"]
        if not path.exists():
            say(f"{path}: is gone, so it was not sent to {redact(self.uri)}")
        elif event.type == "artifact":
            below = Path(data["path"]).parent.as_posix()
            client.log_artifact(self._run_id, str(path), artifact_path=None if below == "." else below)
        else:
            self._send_image(client, path, event)

    def _send_image(self, client: "MlflowClient", path: Path, event: Event) -> None:
        """MLflow names images at random, so one that is there already is recognised by its key and step."""
        from PIL import Image

        key, step = _name(event.data["key"]), event.data["samples"]
        if self._images is None:
            self._images = {found for file in client.list_artifacts(self._run_id, "images") if (found := image_of(file.path))}
        if (image_key(key), step) in self._images:
            return
        with Image.open(path) as image:
            client.log_image(
                self._run_id, image.convert("RGB"), key=key, step=step, timestamp=int(event.time * 1000), synchronous=True
            )
        self._images.add((image_key(key), step))

    # --- the state file

    def _save(self) -> None:
        state = read_state(self.folder)
        state[self._key] = {"experiment_id": self._experiment_id, "run_id": self._run_id, "seq": self._shipped}
        write_json(self.folder / STATE, state)


class _Batch:
    """What goes to the server together."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.metrics: list[Any] = []
        self.params: list[Any] = []
        self.tags: dict[str, Any] = {}
        self.files: list[Event] = []
        self.status: tuple[str, int] | None = None

    def has_room(self) -> bool:
        return len(self.metrics) < MAX_METRICS // 2 and len(self.tags) < MAX_TAGS // 2 and len(self.files) < 10


def run_identity(folder: Path) -> str:
    """What names the run of `folder` on every server. Raises TrackingError for a folder without a log."""
    events = read(folder)
    if not events or events[0].type != "start":
        raise TrackingError(f"{folder}: is no run folder, events.jsonl is missing or damaged; name a folder below runs/")
    return f"{Path(folder).name}/{events[0].data['run']}"


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of a run's copies: by "URI EXPERIMENT", the `experiment_id`, `run_id` and `seq` of the last event sent."""
    try:
        state: dict[str, dict[str, Any]] = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state


def reason(error: BaseException) -> str:
    """An error in one short line."""
    while error.__cause__ is not None and type(error).__module__.startswith("mlflow"):
        error = error.__cause__
    text = " ".join(str(error).split())
    refused = re.search(r"Connection refused|timed out|Name or service not known|No route to host", text)
    return redact(refused.group(0).lower() if refused else text[:200] or type(error).__name__)


def say(message: str) -> None:
    """One line about tracking, on standard error."""
    print(f"tracking: {message}", file=sys.stderr, flush=True)


def _name(key: str) -> str:
    """A key as MLflow allows it."""
    return re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII)


def _text(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text[:MAX_VALUE] if text else "''"


def image_key(key: str) -> str:
    """The key of an image as its file's name has it."""
    return re.sub(r"[/~#]", "~", key)  # MLflow's substitute for "/" has changed over time


def image_of(path: str) -> tuple[str, int] | None:
    """(key, step) from the name that MLflow gives to a logged image."""
    match = re.match(r"(?:.*/)?(.+?)[+%]step[+%](\d+)[+%]timestamp", path)
    return (image_key(match.group(1)), int(match.group(2))) if match else None
