"""Which variants go together: read from the traits of their configs (`hdm.config.traits`), for checks, remedies, plans and docs.

Two variants of different axes refuse each other when one needs a trait that the other takes. What to use instead is computed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from hdm.config.axes import AXES
from hdm.config.errors import ConfigError
from hdm.config.registry import Variant
from hdm.config.schema import RunConfig
from hdm.config.traits import Trait, declared

Choices = Mapping[str, Variant[Any]]  # the variant chosen on each axis, by the axis's name


@dataclass(frozen=True, slots=True)
class Refusal:
    """`needing` needs `trait`, which `taking` takes."""

    needing: Variant[Any]
    taking: Variant[Any]
    trait: Trait

    def __str__(self) -> str:
        need, take = declared(self.needing.config, "needs")[self.trait], declared(self.taking.config, "takes")[self.trait]
        return f"{key(self.needing)}: needs {self.trait.words} ({need}), which {key(self.taking)} takes away ({take})"


def key(variant: Variant[Any]) -> str:
    """The variant as one types it: `merge=cross`."""
    return f"{variant.axis}={variant.name}"


def refusal(a: Variant[Any], b: Variant[Any]) -> Refusal | None:
    """Why `a` and `b` do not go together; None when they do."""
    if a.axis == b.axis:
        return None
    for needing, taking in ((a, b), (b, a)):
        adapted = declared(needing.config, "adapts")
        for trait in Trait:
            if trait in declared(needing.config, "needs") and trait in declared(taking.config, "takes") and trait not in adapted:
                return Refusal(needing, taking, trait)
    return None


def allowed(a: Variant[Any], b: Variant[Any]) -> bool:
    """Whether `a` and `b`, variants of different axes, go together."""
    return refusal(a, b) is None


def refusals(variants: Iterable[Variant[Any]]) -> Iterator[Refusal]:
    """Every refusal among `variants`, in their order."""
    for a, b in combinations(variants, 2):
        if (found := refusal(a, b)) is not None:
            yield found


def chosen(config: Any) -> dict[str, Variant[Any]]:
    """The variants of a run, or of an architecture, by axis."""
    return {name: axis.of(getattr(config, name)) for name, axis in AXES.items() if hasattr(config, name)}


def check(run: RunConfig) -> None:
    """Raise ConfigError, with the nearest remedy, for variants that do not go together."""
    choices = chosen(run)
    for found in refusals(choices.values()):
        raise ConfigError(message(found, choices))


def message(found: Refusal, choices: Choices) -> str:
    """The refusal in one line, with what to use instead, given what else is chosen."""
    instead = remedies(found, choices)
    return f"{found}; use {', or '.join(map(key, instead))}" if instead else f"{found}; leave one of the two"


def remedies(found: Refusal, choices: Choices) -> list[Variant[Any]]:
    """For the taking axis, then for the needing one: the nearest variant that goes with everything else that is chosen.

    Where none does, because more than this pair is at odds, the nearest that goes with the other side of the pair.
    """
    sides = ((found.taking, found.needing), (found.needing, found.taking))
    fitting = [_nearest(side.axis, [v for axis, v in choices.items() if axis != side.axis]) for side, _ in sides]
    if not any(fitting):
        fitting = [_nearest(side.axis, [other]) for side, other in sides]
    return [variant for variant in fitting if variant is not None]


def _nearest(axis: str, others: Iterable[Variant[Any]]) -> Variant[Any] | None:
    """The first variant, the default before all and then in the order of the file, that goes with `others`."""
    others = list(others)
    return next((v for v in ordered(axis) if all(allowed(v, other) for other in others)), None)


def ordered(axis: str) -> list[Variant[Any]]:
    """The variants of an axis: the default, then the others in the order of the file."""
    variants = AXES[axis].variants.values()
    return sorted(variants, key=lambda v: v.name != AXES[axis].default)


def completed(pinned: Choices, rest: Choices) -> dict[str, Variant[Any]]:
    """`pinned` with `rest` on the other axes, of which those that do not go with it are replaced by the nearest that do."""
    choices = {**rest, **pinned}
    for axis in rest:
        if axis not in pinned and not all(allowed(choices[axis], v) for v in pinned.values()):
            settled = [v for name, v in choices.items() if name != axis]
            choices[axis] = _nearest(axis, settled) or _nearest(axis, pinned.values()) or choices[axis]
    return choices


def adapters(config: Any) -> list[str]:
    """How each variant of a run works where another takes a trait that it would like to have: one sentence each."""
    return [line for a, b in permutations(chosen(config).values(), 2) for line in adaptations(a, b)]


def adaptations(a: Variant[Any], b: Variant[Any]) -> list[str]:
    """How `a` works where `b` takes what it would like to have."""
    traits = [t for t in declared(a.config, "adapts") if t in declared(b.config, "takes")]
    return [f"{key(a)} under {key(b)}: {declared(a.config, 'adapts')[trait]}" for trait in traits]
