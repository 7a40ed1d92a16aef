"""What a launcher offers: room, submission, and jobs that say when and how they ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hdm.launch.job import ArmJob

Result = dict[str, Any]  # {"status": finished | interrupted | failed, "reason": one line}


class Job(Protocol):
    """A submitted arm."""

    log: Path  # what it prints

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> Result:
        """How it ended."""

    def stop(self) -> None:
        """Ask it to save and leave."""

    def record(self) -> dict[str, Any] | None:
        """What `Launcher.attach` finds it again by; None when it cannot be."""


class Launcher(Protocol):
    """Starts arms."""

    def room(self) -> int:
        """How many jobs may be submitted now."""

    def submit(self, arms: Sequence[ArmJob]) -> Sequence[Job]:
        """Start the arms, or queue them."""

    def attach(self, record: dict[str, Any]) -> Job | None:
        """The job that an earlier launcher submitted, None when it is not known any more."""

    def close(self) -> None:
        """Let go of the jobs."""


def shown(path: Path) -> Path:
    """`path` as a person would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
