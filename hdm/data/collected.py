"""Data sets made of somebody's files: found, examined by several processes, packed into shards; what cannot be used is set aside.

    plan/train-000000.jsonl      what goes into a shard: one line an item
    train-000000.tar             the shard, under its name when complete, and beside it its index
    found/train-000000.json      what was found out about its items
    quarantine.jsonl             every file that is not in the data set, with the reason
    manifest.json                written last

The user's files are read and never changed. A preparation that is killed goes on with the shards that are missing; shards whose
items have changed since are made again. Shards do not depend on how many processes make them.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hdm.cli import progress
from hdm.config.errors import DataError
from hdm.config.schema import CollectedConfig
from hdm.data import health
from hdm.data.health import UnusableError
from hdm.data.shards import Record, write_shard
from hdm.data.source import MANIFEST, SPLITS, PreparedSource, read_manifest, summary
from hdm.files import replacing, write_json

QUARANTINE = "quarantine.jsonl"
_RECIPE = 1  # raise it when the same settings and files make other shards
_NOT_IN_SHARDS = {"max_quarantined", "images"}


@dataclass(frozen=True, slots=True)
class Item:
    """A sample to be: where its picture is, and its caption or where that is.

    `group` is what is kept on one side of the split; `row` a place inside `where`; `state` changes when the files do; `fault` is
    why it cannot be used, where that is known already.
    """

    key: str
    where: str
    caption: str = ""
    group: str = ""
    row: int = 0
    state: str = ""
    fault: str = ""


class CollectedSource(PreparedSource):
    """Packs files into shards. The subclass finds and reads them."""

    config: CollectedConfig

    def __init__(self, config: CollectedConfig) -> None:
        super().__init__(config)
        self.left_out: Counter[str] = Counter()  # what `collect` met and did not yield, by reason

    @abstractmethod
    def collect(self) -> Iterator[Item]:
        """Every item, in an order that does not depend on the machine. Raises DataError where there is nothing to look at."""

    @abstractmethod
    def load(self, item: Item) -> tuple[bytes, bytes | str]:
        """Picture and caption of an item as they are stored. Raises UnusableError or OSError."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the files are."""

    def settings(self) -> dict[str, Any]:
        """What the shards depend on besides the files."""
        own = {k: v for k, v in asdict(self.config).items() if k not in _NOT_IN_SHARDS}
        return {"recipe": _RECIPE, **own, "origin": str(Path(self.origin).resolve())}

    def plan(self) -> dict[str, list[Any]]:
        """See `CollectedSource.collect`: a plan of millions is not held in memory."""
        raise NotImplementedError

    def make(self, item: Item) -> Record:
        """The sample of one item. Raises UnusableError."""
        return self._examined(item)[0]

    def prepare(self, datasets: Path) -> Path:
        """See `Source.prepare`. Raises DataError when too much cannot be used."""
        folder = super().prepare(datasets)
        self._refuse(folder, read_manifest(folder).get("quarantined", 0), read_manifest(folder).get("items", 1))
        return folder

    def again(self, datasets: Path) -> Path:
        """Look at the files again: what was added, mended or removed."""
        with suppress(FileNotFoundError):
            (self.folder(datasets) / MANIFEST).unlink()
        return self.prepare(datasets)

    def _write(self, folder: Path) -> None:
        counts = self._planned(folder)
        total = sum(counts.values())
        open_ = [name for name in counts if not ((folder / name).exists() and _found(folder, name).exists())]
        with Workers(self, folder, open_, self.workers) as workers, progress(f"Preparing {folder}", total, "files") as advance:
            advance(sum(count for name, count in counts.items() if name not in open_))
            workers.watch(advance, lambda bad: self._refuse(folder, bad, total))
        findings = {name: json.loads(_found(folder, name).read_text(encoding="utf-8")) for name in counts}
        quarantined = self._report(folder, findings, total)
        self._refuse(folder, quarantined, total)
        splits = {s: summary(folder, {n: f["images"] for n, f in findings.items() if n.startswith(s)}) for s in SPLITS}
        for split in SPLITS:
            if not splits[split]["images"]:
                hint = f"raise data.val_share={self.config.val_share:g}" if split == "val" else f"see {folder / QUARANTINE}"
                raise DataError(f"{self.origin}: none of {total} files can be used and belongs to the {split} split; {hint}")
            self._shards(folder, splits[split]["shards"]).write_sidecars()
        digest = hashlib.sha256("".join(s["sha256"] for split in splits.values() for s in split["shards"]).encode()).hexdigest()
        content = {"settings": self.settings(), "digest": digest, "items": total, "quarantined": quarantined, "splits": splits}
        write_json(folder / MANIFEST, {"name": self.name, **self.facts(), **content})

    def _planned(self, folder: Path) -> dict[str, int]:
        """Write the plan; shards whose plan is another one now are removed. Returns the number of items of each shard."""
        (folder / "found").mkdir(exist_ok=True)
        plan = _Plan(folder, self.config.shard)
        seen: set[bytes] = set()
        for item in self.collect():
            key = hashlib.blake2b(item.key.encode(), digest_size=8).digest()
            if key in seen:
                item = Item(key=item.key, where=item.where, state=item.state, fault=item.fault or "two pictures of this name")
            seen.add(key)
            plan.add("val" if held_out(item.group or item.key, self.config.val_share) else "train", item)
        counts = plan.close()
        if not counts:
            raise DataError(f"data.path={self.origin}: no pictures there ({', '.join(sorted(health.PICTURES))})")
        for path in [*folder.glob("*.tar"), *(folder / "plan").glob("*.jsonl")]:
            if path.with_suffix(".tar").name not in counts:
                _forget(folder, path.with_suffix(".tar").name)
                path.unlink(missing_ok=True)
        return counts

    def _pack(self, folder: Path, name: str, advance: Callable[[bool], None]) -> None:
        """Make one shard."""
        found: dict[str, Any] = {"images": 0, "quarantine": [], "notes": Counter()}

        def usable() -> Iterator[Record]:
            with open(_plan(folder, name), encoding="utf-8") as lines:
                for line in lines:
                    item = Item(**json.loads(line))
                    try:
                        record, notes = self._examined(item)
                    except UnusableError as error:
                        entry = {"file": item.where, "key": item.key, "reason": error.reason, "detail": error.detail}
                        found["quarantine"].append(entry)
                        advance(True)
                        continue
                    found["images"] += 1
                    found["notes"].update(notes)
                    advance(False)
                    yield record

        write_shard(folder / name, usable())
        write_json(_found(folder, name), found)

    def _examined(self, item: Item) -> tuple[Record, tuple[str, ...]]:
        if item.fault:
            raise UnusableError(item.fault)
        try:
            data, text = self.load(item)
        except OSError as error:
            raise UnusableError("cannot be read", error.strerror or str(error)) from None
        words = health.caption(text)
        limits = {"min_side": self.config.min_side, "max_pixels": self.config.max_megapixels * 1e6}
        try:
            picture = health.picture(data, item.where, **limits)  # type: ignore[arg-type]
        except MemoryError:
            raise UnusableError("too many pixels", "out of memory") from None
        return Record(key=safe(item.key), image=picture.data, caption=words, extension=picture.extension), picture.notes

    def _report(self, folder: Path, findings: dict[str, Any], total: int) -> int:
        """Write quarantine.jsonl and print what was found; returns how many files are in it."""
        entries = [entry for found in findings.values() for entry in found["quarantine"]]
        with replacing(folder / QUARANTINE) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        notes: Counter[str] = Counter()
        for found in findings.values():
            notes.update(found["notes"])
        print_report(entries, notes=notes, left_out=self.left_out, total=total, origin=self.origin, path=folder / QUARANTINE)
        return len(entries)

    def _refuse(self, folder: Path, bad: int, total: int) -> None:
        if bad > self.config.max_quarantined * total:
            raise DataError(
                f"{self.origin}: {bad} of {total} files ({bad / total:.1%}) cannot be used, more than"
                f" data.max_quarantined={self.config.max_quarantined:g}; {folder / QUARANTINE} says why: mend them and give the"
                " same command again, or raise it"
            )


class Workers:
    """Processes that make shards: each takes the next one that nobody has taken."""

    def __init__(self, source: CollectedSource, folder: Path, names: list[str], count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._taken, self._done, self._bad = context.Value("q", 0), context.Value("q", 0), context.Value("q", 0)
        self._source, self._folder, self._names = source, folder, names
        self._processes = [
            context.Process(target=self._run, args=(os.getpid(),), daemon=True) for _ in range(min(count, len(names)))
        ]

    def __enter__(self) -> "Workers":
        import webdataset  # noqa: F401  # once, and not in every process

        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def watch(self, advance: Callable[[float], None], judge: Callable[[int], None]) -> None:
        """Wait until all is done; `judge` is told, now and then, how many files cannot be used, and may raise."""
        shown = 0
        while True:
            alive = any(process.is_alive() for process in self._processes)
            done = self._done.value
            advance(done - shown)
            shown = done
            failed = next((process for process in self._processes if process.exitcode not in (None, 0)), None)
            if failed is not None:
                raise DataError(
                    f"{self._folder}: a process that prepares shards ended with exit code {failed.exitcode}; if memory ran out give"
                    " the same command again with fewer workers=…, else see what it printed"
                )
            if not alive:
                return
            judge(self._bad.value)
            time.sleep(0.05)

    def _run(self, parent: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        def advance(bad: bool) -> None:
            if os.getppid() != parent:
                os._exit(1)  # nobody waits for this any more
            with self._done.get_lock():
                self._done.value += 1
            if bad:
                with self._bad.get_lock():
                    self._bad.value += 1

        try:
            while True:
                with self._taken.get_lock():
                    number = self._taken.value
                    self._taken.value += 1
                if number >= len(self._names):
                    return
                self._source._pack(self._folder, self._names[number], advance)
        except OSError as error:
            print(f"error: {error.filename or self._folder}: {error.strerror or error}", flush=True)
            os._exit(1)


class _Plan:
    """Writes the items of each shard, as they come."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._lines: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._counts: dict[str, int] = {}
        self._numbers = Counter[str]()
        (folder / "plan").mkdir(exist_ok=True)

    def add(self, split: str, item: Item) -> None:
        """Put `item` into the shard that is being filled."""
        known = {f.name: value for f in fields(item) if (value := getattr(item, f.name)) != f.default}
        self._lines[split].append(json.dumps(known) + "\n")
        if len(self._lines[split]) == self._size:
            self._flush(split)

    def close(self) -> dict[str, int]:
        """The number of items by shard."""
        for split in SPLITS:
            self._flush(split)
        return dict(sorted(self._counts.items()))

    def _flush(self, split: str) -> None:
        lines = self._lines[split]
        if not lines:
            return
        name = f"{split}-{self._numbers[split]:06d}.tar"
        self._numbers[split] += 1
        self._counts[name], self._lines[split] = len(lines), []
        path, text = _plan(self._folder, name), "".join(lines)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            _forget(self._folder, name)
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")


def print_report(
    entries: list[dict[str, str]], *, notes: Counter[str], left_out: Counter[str], total: int, origin: str, path: Path
) -> None:
    """What was found among `total` files, on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(origin)}[/]  {total:,} files, {len(entries):,} quarantined ({len(entries) / max(total, 1):.1%})")
    if entries:
        table = Table("reason", "files", "for example", box=None)
        for reason, count in Counter(entry["reason"] for entry in entries).most_common():
            first = next(entry for entry in entries if entry["reason"] == reason)
            detail = f" ({first['detail']})" if first["detail"] else ""
            name = Path(first["file"]).name.encode(errors="replace").decode()
            table.add_row(escape(reason), f"{count:,}", escape(f"{name}{detail}"[:100]))
        console.print(table)
        console.print(f"every one with its reason: {path}; the files themselves are where they were")
    for title, counted in (("used all the same", notes), ("left out", left_out)):
        if counted:
            console.print(
                f"{title}: " + ", ".join(f"{count:,} {escape(what)}" for what, count in counted.most_common()), style="dim"
            )


def held_out(key: str, share: float) -> bool:
    """Whether what `key` names is held out: by its hash alone, so that other files decide nothing, and a larger share adds only."""
    return int.from_bytes(hashlib.blake2b(f"split/{key}".encode(), digest_size=8).digest()) < share * 2**64


def safe(key: str) -> str:
    """The key as the name of tar members, which ends at the first dot."""
    return re.sub(r"[%.]", lambda match: f"%{ord(match[0]):02X}", key)


def _plan(folder: Path, name: str) -> Path:
    return folder / "plan" / name.replace(".tar", ".jsonl")


def _found(folder: Path, name: str) -> Path:
    return folder / "found" / name.replace(".tar", ".json")


def _forget(folder: Path, name: str) -> None:
    for path in (folder / name, _found(folder, name), folder / f"{name}.index.npy", folder / f"{name}.sizes.npy"):
        path.unlink(missing_ok=True)
