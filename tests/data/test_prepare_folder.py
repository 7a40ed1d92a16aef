"""A folder of pictures becomes shards: what is broken is set aside and named, what is odd is used, a kill loses one shard."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import broken
import numpy as np
import pytest
from PIL import Image

from hdm.config.axes import DATA
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data import health
from hdm.data.captions import parse_caption
from hdm.data.collected import held_out, safe
from hdm.data.images import decode
from hdm.data.sources.pictures import FolderConfig

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """240 files, 12 of them broken, each in its own way."""
    folder = tmp_path_factory.mktemp("pictures")
    broken.make(folder)
    return folder


def source(folder, **fields):
    made = DATA.build(FolderConfig(path=str(folder), **{"val_share": 0.2, "shard": 32, **fields}))
    made.workers = 2
    return made


def entries(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def keys(shards):
    return [shards.read(i).key for i in range(len(shards))]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def prepare(*arguments, **options):
    command = [sys.executable, "-m", "hdm.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, **options)


def test_five_per_cent_broken(pictures, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*")}
    result = prepare("data=folder", f"data.path={pictures}", "data.val_share=0.2", "data.shard=32", f"datasets={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*")} == before
    assert "240 files, 12 quarantined (5.0%)" in result.stdout
    (folder,) = tmp_path.iterdir()
    assert str(folder / "quarantine.jsonl") in result.stdout.replace("\n", "")
    found = {Path(entry["file"]).stem.partition("-")[2]: entry["reason"] for entry in entries(folder)}
    assert found == {what: reason for what, (reason, *_) in broken.BROKEN.items()}
    for reason, count in Counter(found.values()).items():
        assert re.search(rf"{re.escape(reason)} +{count} ", result.stdout)
    for note, *_ in broken.ODD.values():
        assert f"1 {note}" in result.stdout
    used = source(pictures)
    both = [used.open(tmp_path, split) for split in ("train", "val")]
    assert sum(map(len, both)) == 228
    assert not {key for shards in both for key in keys(shards)} & {entry["key"] for entry in entries(folder)}


def test_pictures_and_captions_are_untouched(pictures, tmp_path):
    shards = source(pictures).open(tmp_path, "train")
    for i in range(0, len(shards), 7):
        record = shards.read(i)
        (path,) = [p for p in pictures.glob(f"{record.key}.*") if p.suffix != ".txt"]
        if path.suffix != ".bmp":
            assert record.image == path.read_bytes()
        assert record.caption == path.with_suffix(".txt").read_text()
        assert parse_caption(record.caption).keep == (record.caption.partition(" |||")[0],)


def test_odd_pictures_look_as_they_should(pictures):
    image = broken.photographs()[0].crop((0, 0, 200, 150))
    plain = np.asarray(image, float)
    for what, (note, ending, write) in broken.ODD.items():
        made = health.picture(write(image), f"x{ending}", min_side=64, max_pixels=1e8)
        seen = np.asarray(decode(made.data, (150, 200)).image, float)
        expected = np.asarray(image.convert("L").convert("RGB"), float) if what == "deep" else plain
        assert note in made.notes
        assert np.abs(seen - expected).mean() < {"deep": 0.01, "bitmap": 0.01}.get(what, 4)


def test_shards_do_not_depend_on_processes(pictures, tmp_path):
    one = source(pictures)
    one.workers = 1
    first, second = one.prepare(tmp_path / "one"), source(pictures).prepare(tmp_path / "two")
    assert shard_bytes(first) == shard_bytes(second)
    assert len(shard_bytes(first)) > 6
    assert (first / "quarantine.jsonl").read_text() == (second / "quarantine.jsonl").read_text()
    assert (
        json.loads((first / "manifest.json").read_text())["digest"] == json.loads((second / "manifest.json").read_text())["digest"]
    )


def test_a_killed_preparation_goes_on(pictures, tmp_path):
    whole = source(pictures).prepare(tmp_path / "whole")
    arguments = ["data=folder", f"data.path={pictures}", "data.val_share=0.2", "data.shard=32", f"datasets={tmp_path / 'cut'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hdm.prepare", *arguments, "workers=1"], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list((tmp_path / "cut").glob("*/found/*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "cut").iterdir()
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "found").glob("*.json")}
    finished = (folder / "manifest.json").exists()
    assert source(pictures).prepare(tmp_path / "cut") == folder
    assert finished or 0 < len(done) < len(shard_bytes(whole))
    assert {name: (folder / "found" / name).stat().st_mtime_ns for name in done} == done  # not made twice
    assert shard_bytes(folder) == shard_bytes(whole)


def test_too_much_broken_is_refused_and_mending_helps(pictures, tmp_path):
    strict = source(pictures, max_quarantined=0.04)
    with pytest.raises(
        DataError, match=r"of 240 files \(\d+\.\d%\) cannot be used, more than data\.max_quarantined=0\.04; .*jsonl"
    ):
        strict.prepare(tmp_path)
    folder = source(pictures).prepare(tmp_path)  # the limit is none of the data set's properties
    with pytest.raises(DataError, match=r"12 of 240 files \(5\.0%\)"):
        strict.prepare(tmp_path)
    assert strict.folder(tmp_path) == folder


def small(folder, names, text="a word"):
    image = broken.photographs()[1].crop((0, 0, 100, 80))
    for name in names:
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(broken.saved(image, "JPEG"))
        path.with_suffix(".txt").write_text(text)
    return folder


def test_adding_files_moves_none_between_the_splits(tmp_path):
    folder = small(tmp_path / "p", [f"{i:03d}" for i in range(0, 60, 2)])
    ours = source(folder, shard=8)
    before = {split: set(keys(ours.open(tmp_path / "d", split))) for split in ("train", "val")}
    small(folder, [f"{i:03d}" for i in range(1, 60, 2)])
    assert set(keys(ours.open(tmp_path / "d", "train"))) == before["train"]  # not looked at again by itself
    ours.again(tmp_path / "d")
    after = {split: set(keys(ours.open(tmp_path / "d", split))) for split in ("train", "val")}
    assert before["train"] < after["train"] and before["val"] < after["val"]
    assert len(after["train"] | after["val"]) == 60
    (folder / "001.jpg").unlink()
    (folder / "001.txt").unlink()
    ours.again(tmp_path / "d")
    assert sum(len(ours.open(tmp_path / "d", split)) for split in ("train", "val")) == 59


def test_the_share_that_is_held_out():
    names = [f"picture {i}" for i in range(40_000)]
    held = {share: {name for name in names if held_out(name, share)} for share in (0.0, 0.01, 0.1, 1.0)}
    assert not held[0.0] and len(held[1.0]) == len(names)
    assert held[0.01] < held[0.1]
    for share in (0.01, 0.1):
        assert abs(len(held[share]) - share * 40_000) < 6 * (40_000 * share * (1 - share)) ** 0.5


def test_groups_go_to_one_split(tmp_path):
    folder = small(tmp_path / "p", [f"film{i // 4}_{i % 4}" for i in range(48)])
    ours = source(folder, group=r"^(.*)_\d+$", val_share=0.3)
    films = [{key.partition("_")[0] for key in keys(ours.open(tmp_path / "d", split))} for split in ("train", "val")]
    assert not films[0] & films[1]
    assert len(films[0] | films[1]) == 12


def test_names(tmp_path):
    folder = small(tmp_path / "p", ["a.b/c.d", "a.b/c", "é", "nested/deeper/x", "%41"])
    (folder / "é.PNG").write_bytes(b"")  # a second picture of the name
    (folder / "alone.txt").write_text("no picture")
    (folder / "notes.json").write_text("{}")
    (folder / ".hidden.jpg").write_bytes(b"")
    small(folder, [f"more{i}" for i in range(30)])
    ours = source(folder, val_share=0.3)
    made = ours.prepare(tmp_path / "d")
    found = {key for split in ("train", "val") for key in keys(ours.open(tmp_path / "d", split))}
    assert {safe(name) for name in ("a.b/c.d", "a.b/c", "é", "nested/deeper/x", "%41")} <= found
    assert safe("a.b") == "a%2Eb" and safe("a%2Eb") != safe("a.b")
    assert {(Path(e["file"]).name, e["reason"]) for e in entries(made)} == {
        ("é.jpg", "two pictures of this name"),
        ("alone.txt", "caption without a picture"),
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    folder = small(tmp_path / "p", [f"{i}" for i in range(40)])
    (folder / "3.jpg").chmod(0)
    assert [e["reason"] for e in entries(source(folder).prepare(tmp_path / "d"))] == ["cannot be read"]


def test_a_link_that_leads_nowhere(tmp_path):
    folder = small(tmp_path / "p", [f"{i}" for i in range(40)])
    (folder / "3.jpg").unlink()
    (folder / "3.jpg").symlink_to(folder / "gone.jpg")
    assert [(e["reason"], e["detail"]) for e in entries(source(folder).prepare(tmp_path / "d"))] == [
        ("cannot be read", "No such file or directory")
    ]


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"data\.path=.*gone: is no folder"):
        source(tmp_path / "gone").prepare(tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures there"):
        source(tmp_path / "empty").prepare(tmp_path / "d")
    with pytest.raises(DataError, match=r"belongs to the val split; raise data\.val_share=0"):
        source(small(tmp_path / "p", ["a", "b"]), val_share=0.0).prepare(tmp_path / "d")


def test_damage_is_found_and_repaired(tmp_path):
    ours = source(small(tmp_path / "p", [f"{i}" for i in range(40)]), shard=16)
    folder = ours.prepare(tmp_path / "d")
    before = shard_bytes(folder)
    os.truncate(folder / "train-000001.tar", 700)
    with pytest.raises(DataError, match=r"train-000001\.tar missing or damaged; python -m hdm\.prepare data=folder .* --repair"):
        ours.verify(tmp_path / "d")
    ours.repair(tmp_path / "d")
    assert shard_bytes(folder) == before


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["data.group=("], r"data\.group=\(: is no regular expression"),
        (["data.group=abc"], r"data\.group=abc: needs one"),
        (["data.val_share=0.9"], r"data\.val_share=0\.9: must be between 0 and 0\.5"),
        (["data.max_quarantined=2"], r"data\.max_quarantined=2\.0: must be between"),
    ],
)
def test_bad_settings_are_one_line(lines, words):
    with pytest.raises(ConfigError, match=words):
        compose(["data=folder", *lines])


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    ours = source(small(tmp_path / "p", [f"{i}" for i in range(40)]))
    monkeypatch.setattr(type(ours), "load", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"a process that prepares shards ended with exit code -9; .*fewer workers"):
        ours.prepare(tmp_path / "d")


def test_workers_is_a_number():
    result = prepare("data=folder", "workers=many")
    assert result.returncode == 2
    assert result.stderr == "error: workers=many: must be a number from 1 to 1024\n"


def test_the_bomb_is_never_inflated():
    """3.6 gigapixels named by 1 kB: refused from the header."""
    with pytest.raises(health.UnusableError, match="too many pixels"):
        health.picture(broken.bomb(), "x.png", min_side=1, max_pixels=1e9)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # the global limit is left alone
