"""Reading a sweep from an MLflow server, and giving it the report."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import HdmError, TrackingError, suggest
from hdm.report.record import WORDS, ArmRecord, SweepRecord, assemble
from hdm.track.events import redact
from hdm.track.replica import REASON, RUN_ID, image_key, image_of, reason
from hdm.track.uri import connect, resolve, sqlite_path

if TYPE_CHECKING:
    from mlflow.entities import Run

TAG = "hdm.sweep."
GRID = "samples/grid"
_PAGE = 1000


class Store:
    """One server. Raises TrackingError for one that does not answer, HdmError for what it does not hold."""

    def __init__(self, uri: str | None) -> None:
        resolved = resolve(uri)
        if resolved is None:
            raise HdmError("uri=off keeps no runs; name a server or a database, such as uri=sqlite:///mlflow.db")
        self.uri = redact(resolved)
        path = sqlite_path(resolved) if resolved.startswith("sqlite") else None
        if path is not None and not path.exists():
            raise HdmError(
                f"uri={self.uri}: no such database; name the one that the sweep was tracked in, such as uri=sqlite:///mlflow.db"
            )
        with self._asking():
            self._client = connect(resolved)
            self._experiments = [str(e.experiment_id) for e in self._client.search_experiments()]

    def sweep(self, name: str) -> SweepRecord:
        """The sweep `name`. Raises HdmError, with the names that there are, when there is none."""
        if not re.fullmatch(r"[\w.-]+", name):
            raise HdmError(f"sweep={name}: is no name of a sweep, which has letters, digits, '_', '.' and '-' only")
        with self._asking():
            found = self._search(f"tags.`{TAG}{name}` LIKE '%'")
        parents = [run for run in found if run.data.tags[TAG + name] == "sweep"]
        arms = [run for run in found if run.data.tags[TAG + name] == "arm"]
        if not found:
            raise HdmError(f"sweep={name}: no such sweep at {self.uri}{self._known(name)}")
        parent = parents[-1] if parents else None
        sheet = self.json(parent.info.run_id, "sweep.json") if parent else None
        return assemble(name, _arm(parent) if parent else None, [_arm(run) for run in arms], sheet)

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(samples, value) of one metric, each step once (the first telling), in order."""
        with self._asking():
            history = self._client.get_metric_history(run_id, metric)
        points: dict[int, float] = {}
        for measured in sorted(history, key=lambda m: (m.step, m.timestamp)):
            points.setdefault(measured.step, measured.value)
        return sorted(points.items())

    def picture(self, run_id: str) -> bytes | None:
        """The last sample grid of a run, as PNG; None without one."""
        with self._asking():
            files = [file.path for file in self._client.list_artifacts(run_id, "images")]
        grids = [
            (found[1], path)
            for path in files
            if path.endswith(".png") and (found := image_of(path)) and found[0] == image_key(GRID)
        ]
        return self._bytes(run_id, max(grids)[1]) if grids else None

    def json(self, run_id: str, path: str) -> Any:
        """A JSON artifact; None when it is not there or damaged."""
        content = self._bytes(run_id, path)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError:
            return None

    def log(self, run_id: str, paths: Sequence[Path], folder: Path) -> None:
        """Keep files of `folder` with a run, below report/."""
        with self._asking():
            for path in paths:
                below = (Path("report") / path.relative_to(folder).parent).as_posix()
                self._client.log_artifact(run_id, str(path), artifact_path=below)

    def _search(self, query: str) -> "list[Run]":
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                self._experiments, query, max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _known(self, name: str) -> str:
        with self._asking():
            runs = self._search("params.`sweep.metric` LIKE '%'")
        names = sorted(
            {
                key.removeprefix(TAG)
                for run in runs
                for key, value in run.data.tags.items()
                if key.startswith(TAG) and value == "sweep"
            }
        )
        return f"{suggest(name, names)} (sweeps: {', '.join(names[-12:]) or 'none'})"

    def _bytes(self, run_id: str, path: str) -> bytes | None:
        """The content of an artifact; None when it is not there."""
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(run_id, path, folder)).read_bytes()
            except (MlflowException, OSError):
                return None

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except HdmError:
            raise
        except Exception as error:
            raise TrackingError(f"uri={self.uri}: {reason(error)}; is the server up?") from error


def _arm(run: "Run") -> ArmRecord:
    """An MLflow run as it is kept here; its place in the sweep is found later."""
    tags = dict(run.data.tags)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    contexts = [next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), "") for entry in inputs]
    return ArmRecord(
        run=tags.get(RUN_ID, run.info.run_name or run.info.run_id).rpartition("/")[0] or run.info.run_id,
        point={},
        setting="",
        seed=0,
        run_id=run.info.run_id,
        status=WORDS.get(run.info.status, run.info.status.lower()),
        reason=tags.get(REASON, "").strip("-"),
        params=dict(run.data.params),
        metrics={key: float(value) for key, value in run.data.metrics.items()},
        tags=tags,
        datasets={context: f"{entry.dataset.name} {entry.dataset.digest}" for context, entry in zip(contexts, inputs)},
    )
