"""What a difference between arms is worth. docs/statistics.md says which test answers which question; nothing here knows of files.

minimal_effect(6)                                     the smallest effect that six seeds can show, in standard deviations
least_seeds(comparisons=3)                            the fewest seeds with which p < 0.05 is possible at all
compare({0: 0.41, 1: 0.40}, {"merge=concat": {...}})  paired comparisons with intervals, p-values and verdicts in words
"""

from hdm.stats.comparison import Comparison, Verdict, compare
from hdm.stats.importance import axis_importance
from hdm.stats.multiple import holm
from hdm.stats.noise import NoiseFloor
from hdm.stats.paired import Interval, bca_interval, sign_flip_p, t_interval
from hdm.stats.pareto import pareto_front
from hdm.stats.power import least_seeds, minimal_effect, paired_power, seeds_needed, smallest_p

__all__ = [
    "Comparison",
    "Interval",
    "NoiseFloor",
    "Verdict",
    "axis_importance",
    "bca_interval",
    "compare",
    "holm",
    "least_seeds",
    "minimal_effect",
    "paired_power",
    "pareto_front",
    "seeds_needed",
    "sign_flip_p",
    "smallest_p",
    "t_interval",
]
