"""Where runs are sent: the tracking URI, a database that is safe to create, and the link that opens the right view."""

import hashlib
import logging
import os
import shlex
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm.config.errors import HdmError, TrackingError
from hdm.files import locked, replacing
from hdm.track.events import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

OFF = "off"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_LOCK = 0x68646D  # any number, the same in every process


def resolve(uri: str | None) -> str | None:
    """The absolute tracking URI for `track.uri`; None for "off".

    Without one, $MLFLOW_TRACKING_URI counts, else SQLite in the current folder. Raises TrackingError for what MLflow cannot use.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri == OFF:
        return None
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path is None:
            raise TrackingError(f"track.uri={uri}: names no file; write sqlite:///mlflow.db or sqlite:////absolute/path.db")
        return f"sqlite:///{path.absolute()}"
    if scheme not in ("http", "https", "databricks", *DATABASES):
        raise TrackingError(
            f"track.uri={redact(uri)}: MLflow keeps no runs there; use http://HOST:PORT, sqlite:///FILE.db, postgresql://… or off"
        )
    if scheme in ("http", "https") and not urllib.parse.urlsplit(uri).hostname:
        raise TrackingError(f"track.uri={redact(uri)}: names no host; write {scheme}://HOST:PORT")
    return uri.rstrip("/")


def sqlite_path(uri: str) -> Path | None:
    """The file of an sqlite:/// URI."""
    name = uri.partition(":///")[2].partition("?")[0]
    return Path(name) if name and name != ":memory:" else None


def artifact_root(uri: str) -> Path | None:
    """Where artifacts go; None when a server decides."""
    if uri.startswith("sqlite"):
        path = sqlite_path(uri)
        assert path is not None
        return path.parent / "mlartifacts"
    return Path("mlartifacts").absolute() if uri.startswith(DATABASES) else None


def connect(uri: str) -> "MlflowClient":
    """A client for the resolved `uri` that gives up on a dead server soon. A fresh database is made by one process at a time."""
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not uri.startswith(DATABASES):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = sqlite_path(uri) if uri.startswith("sqlite") else None
    # A fresh database is unusable when two processes meet in its migrations, or one is killed there. They run in the constructor
    # and at the first request; so one process at a time makes it, a file elsewhere, and it appears when it is complete.
    with alone(uri):
        if path is not None and not path.exists():
            with replacing(path) as partial:
                fresh = f"sqlite:///{partial.absolute()}"
                MlflowClient(tracking_uri=fresh, registry_uri=fresh).search_experiments(max_results=1)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def alone(uri: str, *, task: str = "", busy: str | None = None) -> Iterator[None]:
    """Hold the lock of `task` at the database `uri`: of a file beside an SQLite file, of PostgreSQL itself; others have none.

    When another process holds it: waits, or raises HdmError with the message `busy`.
    """
    if uri.startswith("sqlite") and (path := sqlite_path(uri)) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}{task and f'.{task}'}.lock"), busy=busy):
            yield
    elif uri.startswith("postgresql"):
        import sqlalchemy

        key = int.from_bytes(hashlib.blake2b(task.encode(), digest_size=8).digest(), signed=True) if task else _LOCK
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:  # the lock ends with the connection, however this process ends
            call = "pg_try_advisory_lock" if busy else "pg_advisory_lock"
            held = connection.execute(sqlalchemy.text(f"SELECT {call}({key})")).scalar()
            connection.commit()
            if busy and not held:
                raise HdmError(busy)
            yield
    else:
        yield


def experiment_id(client: "MlflowClient", name: str, uri: str) -> str:
    """The id of experiment `name`, which is created where it is missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_root(uri)
        location = (root / urllib.parse.quote(name, safe="")).as_uri() if root else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
    if found is None:
        raise TrackingError(f"track.experiment={name}: cannot be created at {redact(uri)}")
    if found.lifecycle_stage != "active":
        raise TrackingError(f"track.experiment={name}: is deleted at {redact(uri)}; restore it there or name another one")
    return str(found.experiment_id)


def link(uri: str, experiment: str, **view: Any) -> list[str]:
    """The lines that tell how to look at runs: a command when no server runs there yet, and the address of `fragment`."""
    port = 5000
    page = fragment(experiment, **view)
    if uri.startswith("http"):
        return [f"MLflow: {redact(uri)}{page}"]
    server = server_command(redact(uri), port)
    if not server:
        return [f"MLflow: experiment {experiment} at {redact(uri)}"]
    return [f"MLflow: {shlex.join(server)}", f"then:   http://127.0.0.1:{port}{page}"]


def fragment(experiment: str, *, search: str = "", metric: str = "val/loss", ascending: bool = True, view: str = "") -> str:
    """What follows a server's address to open the charts of an experiment, as `view`, a saved one, has them, or as is said here.

    `search` is MLflow's filter over runs, such as ``tags.`hdm.sweep.1f0c` = 'arm'``. The runs are ordered by `metric`, also because
    MLflow folds child runs under their parent, and leaves them out of the charts, as long as the order is by time.
    """
    query = {"searchFilter": search} if search else {}
    query |= {"orderByKey": f"metrics.`{metric}`", "orderByAsc": str(ascending).lower()}
    if view:
        query = {"viewStateShareKey": view}
    query |= {"workflowType": "machine_learning", "compareRunsMode": "CHART"}  # it opens in its GenAI view otherwise
    return f"/#/experiments/{experiment}/runs?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


def server_command(uri: str, port: int) -> list[str]:
    """What serves the database at `uri` on this machine; [] for one that is elsewhere."""
    root = artifact_root(uri)
    if root is None:
        return []
    server = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    return [*server, "--artifacts-destination", str(root)]
