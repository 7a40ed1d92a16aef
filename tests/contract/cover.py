"""A few networks that hold every allowed pair of variants of two axes: a covering array, built greedily and always the same."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from hdm.config.compat import allowed
from hdm.config.registry import Variant

Pair = tuple[Variant, Variant]


def pairs(axes: Mapping[str, Sequence[Variant]]) -> Iterator[Pair]:
    """Every pair of variants of two of the axes."""
    for first, second in combinations(axes.values(), 2):
        yield from ((a, b) for a in first for b in second)


def cover(axes: Mapping[str, Sequence[Variant]]) -> list[tuple[dict[str, Variant], list[Pair]]]:
    """Choices of a variant on each axis, and which allowed pairs each of them is the first to hold.

    Each starts from a pair that none holds yet; every other axis takes, of the variants that go with what is chosen and leave
    something to every other axis, the one that adds most pairs.
    """
    open_pairs = {frozenset((id(a), id(b))): (a, b) for a, b in pairs(axes) if allowed(a, b)}
    good = frozenset(open_pairs)

    def fits(variant: Variant, choices: Sequence[Variant]) -> bool:
        return all(frozenset((id(variant), id(c))) in good for c in choices)

    def leaves(choices: Sequence[Variant]) -> bool:
        taken = {c.axis for c in choices}
        return all(any(fits(v, choices) for v in axes[axis]) for axis in axes if axis not in taken)

    def gain(variant: Variant, choices: Sequence[Variant]) -> int:
        return sum(frozenset((id(variant), id(c))) in open_pairs for c in choices)

    found = []
    while open_pairs:
        choices = [*next(iter(open_pairs.values()))]
        for axis in [axis for axis in axes if all(c.axis != axis for c in choices)]:
            fitting = [v for v in axes[axis] if fits(v, choices) and leaves([*choices, v])]
            if fitting:
                choices.append(max(fitting, key=lambda v: gain(v, choices)))
        held = [frozenset((id(a), id(b))) for a, b in combinations(choices, 2)]
        found.append(({c.axis: c for c in choices}, [open_pairs.pop(pair) for pair in held if pair in open_pairs]))
    return found
