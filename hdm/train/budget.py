"""What a run has used, and when it has used enough. Needs no torch."""

from dataclasses import dataclass, fields, replace

from hdm.config.errors import ConfigError
from hdm.config.schema import BudgetConfig


@dataclass(kw_only=True, slots=True)
class Clock:
    """What a run has used so far; field names are those of `BudgetConfig`. `device_seconds` are those of all processes together."""

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0

    def spend(self, seconds: float, *, devices: int) -> None:
        """`seconds` have gone by, on so many devices."""
        self.seconds += seconds
        self.device_seconds += seconds * devices

    def copy(self) -> "Clock":
        """The reading of this moment."""
        return replace(self)


def limits(budget: BudgetConfig, *, may_be_none: bool = False) -> dict[str, float]:
    """The limits that are set, by field of Clock. Raises ConfigError when there is none, unless there may be none."""
    found = {f.name: getattr(budget, f.name) for f in fields(budget) if getattr(budget, f.name) is not None}
    if not found and not may_be_none:
        raise ConfigError(
            "budget: has no limit, the run would never end; set one of budget.steps, budget.samples, budget.flops, budget.seconds"
        )
    return found


def used(budget: BudgetConfig, clock: Clock) -> float:
    """The largest used fraction of the limits; 1 or above: the run is over."""
    return max(float(getattr(clock, name)) / limit for name, limit in limits(budget).items())
