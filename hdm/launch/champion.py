"""The arm to go on with, as a version of a registered model that carries the alias `champion`."""

from typing import TYPE_CHECKING

from hdm.launch.ranking import Row
from hdm.track.replica import Replica, reason, say
from hdm.track.uri import connect, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hdm.launch.campaign import Sweep
    from hdm.launch.ranking import Ranking

ALIAS = "champion"


def crown(sweep: "Sweep", ranking: "Ranking") -> list[str]:
    """Point the alias at the best run of the leading setting; return the line that says so, [] where there is none.

    The registered model has the sweep's name. A version names its run and the run's folder, where the weights stay: they are too
    large to be sent for every sweep.
    """
    uri, row = resolve(sweep.run.track.uri), _chosen(ranking)
    if uri is None or row is None:
        return []
    try:
        replica = Replica(row.arm.folder, uri=uri, experiment=sweep.run.track.experiment)
        version = _register(connect(uri), sweep, ranking, row, replica.open())
    except Exception as error:  # whatever it is, the sweep is done
        say(f"no champion: {reason(error)}")
        return []
    return [f"champion: models:/{sweep.name}@{ALIAS} is version {version}, {row.arm.label}"]


def _chosen(ranking: "Ranking") -> Row | None:
    rows = [row for row in ranking.settings.get(ranking.leader() or "", []) if ranking.value(row) is not None]
    sign = 1.0 if ranking.minimize else -1.0
    return min(rows, key=lambda row: sign * (ranking.value(row) or 0.0), default=None)


def _register(client: "MlflowClient", sweep: "Sweep", ranking: "Ranking", row: Row, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    if not client.search_registered_models(f"name = '{sweep.name}'"):
        try:
            client.create_registered_model(sweep.name, description=f"The best arm of sweep {sweep.name} by {ranking.metric}.")
        except MlflowException:  # another launcher was faster
            client.get_registered_model(sweep.name)
    known = [v for v in client.search_model_versions(f"name = '{sweep.name}'") if v.run_id == run_id]
    means = (
        f"its setting's mean over seeds is {ranking.summary()[f'sweep/{row.arm.setting}']:.5g}" if ranking.seeds > 1 else "one seed"
    )
    words = f"{row.arm.label}: {ranking.metric} {ranking.value(row):.5g}; {means}. Weights: {row.arm.folder}."
    verdict = next((c.words for c in ranking.comparisons() if c.name == row.arm.setting), "the baseline")
    if known:
        version = str(known[0].version)
        client.update_model_version(sweep.name, version, description=words)
    else:
        source = client.get_run(run_id).info.artifact_uri
        version = str(client.create_model_version(sweep.name, source, run_id, description=words).version)
    for key, value in {"setting": row.arm.setting, "verdict": verdict, "folder": str(row.arm.folder)}.items():
        client.set_model_version_tag(sweep.name, version, key, value)
    client.set_registered_model_alias(sweep.name, ALIAS, version)
    return version
