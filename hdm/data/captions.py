"""Captions: the report's record format, and the draw that a sample makes from its record.

    keep $$ keep ||| tag $$ tag %% tag $$ tag

Before `|||` stands what is always kept, in order. Behind it are groups, separated by `%%`, of tags, separated by `$$`. Each time a
sample is seen, groups are shuffled and dropped, tags within them are dropped and shuffled, and what is left is joined by ", "
(spec 1.3 m and 1.4). A caption without any of these marks is a plain sentence and is kept whole. Another mark than `$$` may
separate tags: with `captions.separator=,` all of "1girl, solo, smile" are tags that may be dropped and shuffled.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hdm.config.errors import DataError
from hdm.config.schema import CaptionConfig

KEEP, GROUP, TAG = "|||", "%%", "$$"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caption:
    """A parsed caption record: `keep` is never dropped; `groups` hold the tags that may be."""

    keep: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]


def parse_caption(text: str, separator: str = TAG) -> Caption:
    """Parse a caption record whose tags are split at `separator`. Raises DataError when `|||` stands in it more than once."""
    head, *rest = text.split(KEEP)
    if len(rest) > 1:
        raise DataError(f"caption with {len(rest)} '{KEEP}', one is allowed: {' '.join(text.split())[:80]}")
    if not rest and GROUP not in text and separator not in text:
        return Caption(keep=_tags(text, separator), groups=())
    keep, flexible = (head, rest[0]) if rest else ("", head)
    groups = (_tags(group, separator) for group in flexible.split(GROUP))
    return Caption(keep=_tags(keep.replace(GROUP, separator), separator), groups=tuple(group for group in groups if group))


def full_caption(text: str) -> str:
    """Everything in a caption record, in its own order: what validation and sampling use."""
    caption = parse_caption(text)
    return ", ".join([*caption.keep, *(tag for group in caption.groups for tag in group)])


def draw_caption(text: str, config: CaptionConfig, rng: np.random.Generator) -> str:
    """One draw from a caption record: shuffled, with dropout, possibly empty. A pure function of the three arguments."""
    caption = parse_caption(text, config.separator)
    if rng.random() < config.text_dropout:
        return ""
    words = list(caption.keep)
    for group in _ordered(caption.groups, config.shuffle and config.shuffle_groups, rng):
        if rng.random() < config.group_dropout:
            continue
        kept = tuple(tag for tag in group if rng.random() >= config.tag_dropout)
        words.extend(_ordered(kept, config.shuffle, rng))
    return ", ".join(words)


def only_caption(text: str, config: CaptionConfig) -> str | None:
    """The one caption, besides the empty one, that can be drawn from a record; None where draws differ."""
    random = config.shuffle or config.tag_dropout > 0 or config.group_dropout > 0
    return None if random and parse_caption(text).groups else full_caption(text)


def _ordered(items: tuple[T, ...], shuffle: bool, rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))] if shuffle else list(items)


def _tags(text: str, separator: str) -> tuple[str, ...]:
    return tuple(stripped for tag in text.split(separator) if (stripped := " ".join(tag.split())))
