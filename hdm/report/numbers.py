"""Numbers as text: as many digits as they are worth."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MINUS, NOTHING = "−", "–"


@dataclass(kw_only=True, slots=True, frozen=True)
class Digits:
    """How the numbers of one column are written: all with the same decimals, two of which the spread over seeds reaches."""

    decimals: int

    @classmethod
    def of(cls, values: Iterable[float], spreads: Iterable[float]) -> "Digits":
        """For a column of `values` with standard deviations `spreads`; five significant digits where there is no spread."""
        known = sorted(s for s in spreads if math.isfinite(s) and s > 0)
        sizes = [abs(v) for v in values if math.isfinite(v) and v]
        if known:
            return cls(decimals=_clip(1 - math.floor(math.log10(known[len(known) // 2]))))
        return cls(decimals=_clip(4 - math.floor(math.log10(max(sizes)))) if sizes else 3)

    def text(self, value: float, *, sign: bool = False) -> str:
        """`0.412`, `−0.003`; with `sign` `+0.412`; `–` for what is not there, the word for what is not finite."""
        if math.isnan(value):
            return NOTHING
        if math.isinf(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        return f"{value:{'+' if sign else ''}.{self.decimals}f}".replace("-", MINUS)

    def spread(self, mean: float, deviation: float) -> str:
        """`0.412 ± 0.003`."""
        return self.text(mean) if math.isnan(deviation) else f"{self.text(mean)} ± {self.text(deviation)}"


def p_value(p: float) -> str:
    """Three decimals; below 0.001 one significant digit."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-").replace("-", MINUS)


def duration(seconds: float) -> str:
    """`42 s`, `17.7 min`, `3.2 h`; `–` for NaN."""
    if math.isnan(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{short(seconds / 3600)} h"


def short(value: float) -> str:
    """`27.7k`, `1.4G`, `0.52`; `–` for NaN."""
    if math.isnan(value):
        return NOTHING
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _clip(decimals: int) -> int:
    return min(max(decimals, 0), 8)
