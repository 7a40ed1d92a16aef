"""A saved view of MLflow's run comparison: which runs, grouped how, which charts. One experiment tag holds it.

MLflow documents no format. This one is what its UI keeps itself. It is written for the versions that it was tried with in a browser
(tests/browser); for others there is none, and people get the plain link.
"""

import base64
import hashlib
import json
import time
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRIED = ("3.17",)
TAG = "mlflow.sharedViewState."
_LONGEST = 20_000  # characters of an experiment tag


@dataclass(kw_only=True, slots=True)
class SavedView:
    """What the view shows. `group` is the tag whose values are averaged over, `curves` and `bars` are metrics, `images` image keys.

    `parameters` are drawn against `metric` in parallel coordinates; none where that is empty.
    """

    name: str
    search: str
    metric: str
    ascending: bool = True
    group: str = ""
    parameters: Sequence[str] = ()
    bars: Sequence[str] = ()
    curves: Sequence[str] = ()
    images: Sequence[tuple[str, int]] = ()
    expanded: Sequence[str] = field(default=())

    def save(self, client: "MlflowClient", experiment: str) -> str:
        """Write it, in place of one of the same name; return the key by which an address names it.

        Raises ValueError for a view that is too large.
        """
        key = hashlib.blake2b(self.name.encode(), digest_size=10).hexdigest()
        packed = base64.b64encode(zlib.compress(json.dumps(self._state(key)).encode(), 9)).decode()
        now = int(time.time() * 1000)
        text = json.dumps({"name": self.name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})
        if len(text) > _LONGEST:
            raise ValueError(f"a view of {len(text)} characters is more than MLflow keeps")
        client.set_experiment_tag(experiment, TAG + key, text)
        return key

    def _state(self, key: str) -> dict[str, Any]:
        sections = [("overview", f"{key}-o"), ("curves", f"{key}-c"), ("samples", f"{key}-s")]
        place = dict(sections)
        charts: list[dict[str, Any]] = []

        def add(kind: str, section: str, **more: Any) -> None:
            own = {"uuid": f"{key}-{len(charts)}", "type": kind, "metricSectionId": place[section]}
            charts.append(own | {"runsCountToCompare": 20, "deleted": False, "isGenerated": False} | more)

        if self.parameters:
            chosen = {"selectedParams": list(self.parameters), "selectedMetrics": [self.metric], "showAllRuns": True}
            add("PARALLEL", "overview", displayName=f"{self.metric} by {', '.join(self.parameters)}", **chosen)
        for metric in self.bars:
            add("BAR", "overview", metricKey=metric, displayName=metric)
        for metric in self.curves:
            add("LINE", "curves", metricKey=metric, selectedMetricKeys=[metric], displayName=metric, **_LINE)
        for image, step in self.images:
            add("IMAGE", "samples", imageKeys=[image], step=step, showRunParams=True)
        columns = [f"params.`{name}`" for name in self.parameters] + [f"metrics.`{name}`" for name in self.bars]
        groups = [{"mode": "tag", "groupByData": self.group}] if self.group else []
        return {
            "searchFilter": self.search, "orderByKey": f"metrics.`{self.metric}`", "orderByAsc": self.ascending, "startTime": "ALL",
            "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": columns,
            "columnOrder": [], "columnWidths": {}, "runsExpanded": dict.fromkeys(self.expanded, True), "runsPinned": [],
            "runsHidden": [], "runsHiddenMode": "SHOWALL", "compareRunCharts": charts,
            "compareRunSections": [
                {"uuid": uuid, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
                for name, uuid in sections
            ],
            "viewMaximized": False, "runListHidden": False, "isAccordionReordered": True, "useGroupedValuesInCharts": True,
            "hideEmptyCharts": True, "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if groups else None,
            "groupsExpanded": {}, "autoRefreshEnabled": True,
            "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        }  # fmt: skip


_LINE = {
    "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear", "xAxisKey": "step", "selectedXAxisMetricKey": "",
    "range": {"xMin": None, "xMax": None, "yMin": None, "yMax": None}, "yAxisKey": "metric", "yAxisExpressions": [],
    "ignoreOutliers": False,
}  # fmt: skip


def tried(uri: str) -> bool:
    """Whether views can be written for the UI that shows what is at the resolved `uri`. Raises OSError when a server is silent."""
    if uri.startswith("http"):
        with urllib.request.urlopen(f"{uri}/version", timeout=20) as answer:
            version = answer.read().decode()
    else:
        import mlflow

        version = mlflow.__version__
    return version.startswith(tuple(f"{minor}." for minor in TRIED))
