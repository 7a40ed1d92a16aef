"""What a swept key ranges over where it has no list of values."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """All numbers from `low` to `high`; with `log` as dense at every order of magnitude."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __str__(self) -> str:
        text = f"interval({self.low:g},{self.high:g})"
        text = f"int({text})" if self.integer else text
        return f"tag(log,{text})" if self.log else text


Domain = list[str] | Interval
