"""Traits: what a variant needs of the variants on other axes, or takes away from them. `hdm.config.compat` reads them.

A config class states them as data, each trait with one clause that says why or how:

    class NeighborhoodConfig:
        needs: ClassVar[dict[str, str]] = {"grid": "its windows are cut from the grid"}
    class TreadConfig:
        takes: ClassVar[dict[str, str]] = {"grid": "a part of the image tokens bypasses"}

`adapts` names a trait that a variant would like to have, and how it works all the same where another variant takes it.
`implies` of a backbone holds the lines that its published form sets on other axes (see `hdm.config.lines.imply`).
"""

from enum import StrEnum

from hdm.config.errors import ConfigError, suggest


class Trait(StrEnum):
    """A property of the whole network or batch that one variant may need and another take away; `words` complete "needs …"."""

    words: str

    def __new__(cls, name: str, words: str) -> "Trait":
        """The member `name`, which compares equal to that text."""
        member = str.__new__(cls, name)
        member._value_, member.words = name, words
        return member

    GRID = "grid", "the complete grid of image tokens inside the blocks"
    IMAGE_SEQUENCE = "image_sequence", "a sequence of image tokens alone"
    TEXT_SEQUENCE = "text_sequence", "text tokens in the sequence"
    SKIPS = "skips", "encoder states to merge"
    ROUTE = "route", "a middle that image tokens can bypass"
    FREE_DECODER = "free_decoder", "last blocks that may see more tokens than the first"
    JOINT = "joint", "sublayers that take two sets of weights"
    ONE_GRID = "one_grid", "one grid of image tokens in all blocks"
    SQUARE = "square", "batches of square images of one size"


DECLARATIONS = ("needs", "takes", "adapts")


def declared(config: type, kind: str) -> dict[str, str]:
    """The `needs`, `takes`, `adapts` or `implies` of a config class; {} when it states none."""
    found: dict[str, str] = getattr(config, kind, {})
    return found


def validate(variant: str, config: type) -> None:
    """Raise ConfigError, naming `variant`, for an unknown trait or one without its clause."""
    known = [trait.value for trait in Trait]
    for kind in DECLARATIONS:
        for trait, why in declared(config, kind).items():
            if trait not in known:
                raise ConfigError(
                    f"{variant}: {kind} '{trait}', which is no trait{suggest(trait, known)} (traits: {', '.join(known)})"
                )
            if not why.strip():
                raise ConfigError(f"{variant}: {kind} '{trait}' without a reason; write one clause")
