"""What a run tells the world while it runs. `hdm.track.events.EventLog` writes it down; tests may listen in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Recorder(Protocol):
    """A sink for what happens in a run. Nothing here waits for a network."""

    def params(self, values: Mapping[str, Any]) -> None:
        """The flat configuration, once."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Labels of the run."""

    def metrics(self, values: Mapping[str, float], samples: int | None) -> None:
        """Numbers at `samples` seen; None for a summary of the whole run."""

    def rewind(self, samples: int) -> None:
        """The run goes on from `samples` seen: what was recorded beyond that is void and will be recorded again."""

    def image(self, key: str, path: Path, samples: int) -> None:
        """A picture (PNG below the run folder) at `samples` seen."""

    def artifact(self, path: Path) -> None:
        """A file below the run folder to keep with the run."""

    def dataset(self, name: str, digest: str, context: str) -> None:
        """A data set that the run reads, with its digest; context is "train" or "validation"."""


class Silent:
    """Records nothing: the recorder of all processes but the first."""

    def params(self, values: Mapping[str, Any]) -> None:
        """See Recorder."""

    def tags(self, values: Mapping[str, str]) -> None:
        """See Recorder."""

    def metrics(self, values: Mapping[str, float], samples: int | None) -> None:
        """See Recorder."""

    def rewind(self, samples: int) -> None:
        """See Recorder."""

    def image(self, key: str, path: Path, samples: int) -> None:
        """See Recorder."""

    def artifact(self, path: Path) -> None:
        """See Recorder."""

    def dataset(self, name: str, digest: str, context: str) -> None:
        """See Recorder."""
