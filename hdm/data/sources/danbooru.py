"""Danbooru2023-style metadata: posts with tags by kind, a score and a date, and a sentence for each from another model.

The report trains on 7.6M such posts with captions of a vision-language model, and its last stage on those that have a quality tag
and a time tag. It states neither thresholds nor the caption's layout. Ours: the percentiles and years that Animagine XL 3.1
documents for its tags of the same names, and a layout that keeps what a picture is of and may drop the rest (docs/data.md).
"""

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm.config.axes import DATA
from hdm.config.check import require
from hdm.config.errors import ConfigError, DataError
from hdm.config.registry import option
from hdm.config.schema import CollectedConfig, RunConfig
from hdm.data.captions import GROUP, KEEP, TAG
from hdm.data.collected import CollectedSource, Item
from hdm.data.health import PICTURES
from hdm.data.tables import rows, table_files

_KINDS = {"general": "general", "artists": "artist", "characters": "character", "copyrights": "copyright", "meta": "meta"}
_RATINGS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
_QUALITIES = ("worst quality", "low quality", "", "best quality", "masterpiece")
_TIMES = ("old", "early", "mid", "recent", "newest")
_CURATED_TIMES = {"newest", "recent", "old"}  # of the report's note
_PEOPLE = re.compile(r"\d+\+?(girl|boy|other)s?")


@dataclass(kw_only=True, slots=True)
class DanbooruConfig(CollectedConfig):
    """Danbooru2023-style metadata (Parquet or JSON Lines) and a folder of its images; a second caption for each, if any."""

    path: str = option("images", "folder of the images")
    metadata: str = option("metadata.parquet", "table of posts (.parquet, .jsonl), or a folder of such tables")
    file: str = option("{bucket}/{id}.{file_ext}", "where a post's image is in data.path: any column, and bucket = id modulo 1000")
    sentences: str | None = option(
        None, "table with the columns id and data.sentence; null: a column of the metadata, if it has one"
    )
    sentence: str = option("caption", "column of the second, natural-language caption")
    template: str = option(
        "{quality} $$ {time} $$ {people} $$ {characters} $$ {copyrights} $$ {artists}"
        " ||| {general} %% {sentence} %% {meta} $$ {rating}",
        "layout of the captions",
    )
    percentiles: list[float] = option(
        [10.0, 25.0, 85.0, 95.0], "of the scores: up to the first worst, the second low quality; above the others best, masterpiece"
    )
    years: list[int] = option([2011, 2015, 2018, 2021], "first years of early, mid, recent, newest; older posts are old")
    curated: bool = option(False, "only posts with a quality tag and one of newest, recent and old (the report's last stage)")
    families: bool = option(False, "a post, its parent and its siblings are held out together")

    def check(self, run: RunConfig) -> None:
        """Thresholds in order, placeholders that exist."""
        CollectedConfig.check(self, run)
        require(
            len(self.percentiles) == 4 and self.percentiles == sorted(self.percentiles),
            f"data.percentiles={self.percentiles}: must be four numbers in ascending order, as in [10, 25, 85, 95]",
        )
        require(
            len(self.years) == 4 and self.years == sorted(self.years),
            f"data.years={self.years}: must be four years in ascending order, as in [2011, 2015, 2018, 2021]",
        )
        fields = "quality time people characters copyrights artists general sentence meta rating".split()
        for key, text, known in (("template", self.template, fields), ("file", self.file, None)):
            try:
                names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
            except ValueError as error:
                raise ConfigError(f"data.{key}={text}: {error}; placeholders look like {{id}}") from None
            strange = [name for name in names if not name.isidentifier() or (known and name not in known)]
            require(
                not strange, f"data.{key}: has no {{{strange[0] if strange else ''}}}; it takes {', '.join(known or ['columns'])}"
            )
        require(self.template.count("|||") <= 1, f"data.template={self.template}: has several |||, one is allowed")


@DATA.register("danbooru", DanbooruConfig)
class Danbooru(CollectedSource):
    """See DanbooruConfig."""

    config: DanbooruConfig

    @property
    def origin(self) -> str:
        """The folder of the images."""
        return self.config.path

    def collect(self) -> Iterator[Item]:
        """Every post that is a picture, in the order of the metadata."""
        files = table_files(self.config.metadata, "data.metadata")
        if not Path(self.config.path).is_dir():
            raise DataError(f"data.path={self.config.path}: is no folder; set data.path to the folder of the images")
        limits = self._limits(files)
        sentences = self._sentences()
        for row in rows(files):
            post = self._item(row, limits, sentences)
            if isinstance(post, Item):
                yield post
            else:
                self.left_out[post] += 1

    def load(self, item: Item) -> tuple[bytes, str]:
        """See `CollectedSource.load`."""
        return Path(item.where).read_bytes(), item.caption

    def _item(self, row: Mapping[str, Any], limits: NDArray[np.float64], sentences: Mapping[str, str] | None) -> Item | str:
        """The item of a post, or why it is none."""
        post = row.get("id")
        if post is None:
            raise DataError(f"data.metadata={self.config.metadata}: a row has no id; the column must be called id")
        if row.get("is_deleted") or row.get("is_banned"):
            return "deleted or banned posts"
        extension = row.get("file_ext")
        if extension and f".{extension}".lower() not in PICTURES:
            return "posts that are no picture"
        quality, time = quality_tag(row.get("score"), limits), time_tag(row.get("created_at"), self.config.years)
        if self.config.curated and not (quality and time in _CURATED_TIMES):
            return "posts without the tags of the curated set"
        sentence = row.get(self.config.sentence) if sentences is None else sentences.get(str(post))
        try:
            where = self.config.file.format_map({"bucket": f"{int(post) % 1000:04d}", **row})
        except (KeyError, ValueError) as error:
            raise DataError(f"data.file={self.config.file}: post {post} gives it no {error}; name columns that there are") from None
        place = Path(self.config.path) / where
        try:
            status = place.stat()
            state = f"{status.st_size}/{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        caption = caption_of(row, sentence=sentence or "", quality=quality, time=time, template=self.config.template)
        group = str(row.get("parent_id") or post) if self.config.families else ""
        return Item(key=str(post), where=str(place), caption=caption, group=group, state=state)

    def _limits(self, files: list[Path]) -> NDArray[np.float64]:
        """The scores at which quality tags change."""
        scores = np.array([row["score"] for row in rows(files, ["score"]) if _number(row.get("score"))], np.float64)
        return score_limits(scores, self.config.percentiles)

    def _sentences(self) -> dict[str, str] | None:
        if self.config.sentences is None:
            return None
        column, found = self.config.sentence, {}
        for row in rows(table_files(self.config.sentences, "data.sentences"), ["id", column]):
            if "id" not in row or column not in row:
                raise DataError(
                    f"data.sentences={self.config.sentences}: needs the columns id and {column}; it has {', '.join(row)}"
                )
            found[str(row["id"])] = str(row[column] or "")
        return found


def score_limits(scores: NDArray[np.float64], percentiles: list[float]) -> NDArray[np.float64]:
    """For each percentile the largest score that does not lie above it; -inf where none does.

    A score's percentile is its mid-rank: 100 (number below + half of the number of equals) / number. Equal scores have equal tags.
    """
    if not len(scores):
        return np.full(len(percentiles), -np.inf)
    values, counts = np.unique(scores, return_counts=True)
    ranks = 100 * (np.cumsum(counts) - counts / 2) / len(scores)
    return np.array([values[ranks <= p].max(initial=-np.inf) for p in percentiles])


def quality_tag(score: Any, limits: NDArray[np.float64]) -> str:
    """The quality tag of a score; empty in the middle and without a score."""
    return _QUALITIES[int(np.searchsorted(limits, score, side="left"))] if _number(score) else ""


def time_tag(created: Any, years: list[int]) -> str:
    """The time tag of a date, whose text begins with the year, or of a date object; empty without one."""
    match = re.match(r"\s*(\d{4})\b", str(created or ""))
    return _TIMES[int(np.searchsorted(years, int(match[1]), side="right"))] if match else ""


def caption_of(row: Mapping[str, Any], *, sentence: str, quality: str, time: str, template: str) -> str:
    """The caption record of a post."""
    tags = {name: _tags(row.get(f"tag_string_{kind}", row.get(f"tags_{kind}"))) for name, kind in _KINDS.items()}
    people = [tag for tag in tags["general"] if _PEOPLE.fullmatch(tag)]
    tags["general"] = [tag for tag in tags["general"] if tag not in people]
    words = {name: f" {TAG} ".join(map(_plain, found)) for name, found in {**tags, "people": people}.items()}
    rating = str(row.get("rating") or "")
    said = {"sentence": _unmarked(sentence), "quality": quality, "time": time, "rating": _RATINGS.get(rating, rating)}
    return template.format_map({**words, **said})


def _tags(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else [str(tag) for tag in (value if value is not None else [])]


def _plain(tag: str) -> str:
    """A tag in words: underscores are spaces, except in emoticons such as ^_^, which have three characters or fewer."""
    return _unmarked(tag if len(tag) <= 3 else tag.replace("_", " "))


def _unmarked(text: str) -> str:
    """The text without the marks of the caption format."""
    for mark in (KEEP, GROUP, TAG):
        while mark in text:
            text = text.replace(mark, mark[0])
    return " ".join(text.split())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
