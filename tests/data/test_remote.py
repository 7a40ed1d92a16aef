"""Shards at addresses: fsspec's memory and file systems, and a real HTTP server that can answer ranges, fail and die."""

import multiprocessing
import os
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from tiny import samples, write

from hdm.config.axes import DATA
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data import places
from hdm.data.copies import Copies
from hdm.data.loader import training_batches
from hdm.data.places import Address
from hdm.data.sources.folder import WebDatasetConfig


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges. `server.trouble` is asked for each request: None, an error status, "cut" or "whole"."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.translate_path(self.path)
        self.server.asked.append((os.path.basename(path), self.headers.get("Range")))
        if os.path.isdir(path):
            super().do_GET()
            return
        if not os.path.exists(path):
            self.send_error(404)
            return
        trouble = self.server.trouble(self)
        if isinstance(trouble, int):
            self.send_error(trouble)
            return
        with open(path, "rb") as file:
            data = file.read()
        wanted = self.headers.get("Range")
        if wanted and trouble != "whole":
            first, last = wanted.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[: len(part) // 2] if trouble == "cut" else part)

    def do_HEAD(self):
        path = self.translate_path(self.path)
        if not os.path.exists(path):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(os.path.getsize(path)))
        self.end_headers()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server of tmp_path/web; its `address` and `folder`."""
    monkeypatch.setattr(places, "_PAUSES", (0.01, 0.02, 0.02, 0.02))
    folder = tmp_path / "web"
    for i in range(3):
        write(folder / f"train-{i:03d}.tar", samples(4, first=4 * i))
    write(folder / "val-000.tar", samples(2, first=100))

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
    server.asked, server.trouble = [], lambda handler: None
    server.folder, server.address = folder, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def source(path, **fields):
    return DATA.build(WebDatasetConfig(path=str(path), **fields))


def everything(shards):
    return [(r.key, r.image, r.caption) for r in map(shards.read, range(len(shards)))]


@pytest.mark.parametrize("cache", [0.0, 0.001])
def test_http_is_the_same_as_the_folder(web, tmp_path, cache):
    local = source(web.folder).open(tmp_path / "a", "train")
    remote = source(web.address, cache_gb=cache).open(tmp_path / "b", "train")
    assert everything(remote) == everything(local)
    assert remote.digest == local.digest
    assert (remote.sizes() == local.sizes()).all()
    assert source(web.address, cache_gb=cache).open(tmp_path / "b", "val").read(0).key == "0100"


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_file_systems(web, tmp_path, protocol):
    address = f"file://{web.folder}"
    if protocol == "memory":
        address = "memory://hdm-test"
        for path in web.folder.iterdir():
            fsspec.filesystem("memory").pipe(f"hdm-test/{path.name}", path.read_bytes())
    remote = source(address, train="train-{000..002}.tar").open(tmp_path / "b", "train")
    assert everything(remote) == everything(source(web.folder).open(tmp_path / "a", "train"))


def test_batches_over_http(run, web, tmp_path):
    """The same stream as from the folder, in this process and in workers, which are forked from one that has been reading."""
    local, remote = (source(path).open(tmp_path / "i", "train") for path in (web.folder, web.address))
    remote.read(0)
    streams = []
    for shards, workers in ((local, 0), (remote, 0), (remote, 2)):
        run.train.workers = workers
        batches = training_batches(run, shards, start=0, batch_size=4)
        streams.append([(b.keys, b.captions, b.pixels.numpy().tobytes()) for b in (next(batches) for _ in range(4))])
        batches.close()
    assert streams[0] == streams[1] == streams[2]


def test_a_micro_batch_is_one_request_a_sample(web, tmp_path):
    remote = source(web.address).open(tmp_path, "train")
    web.asked.clear()
    remote.fetch([0, 5, 9])
    assert sorted(name for name, _ in web.asked) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert [remote.read(i).key for i in (5, 0, 9)] == ["0005", "0000", "0009"]
    assert len(web.asked) == 3


def test_an_index_beside_the_shards_saves_reading_them(web, tmp_path):
    source(web.folder).open(tmp_path / "a", "train").write_sidecars()
    web.asked.clear()
    remote = source(web.address).open(tmp_path / "b", "train")
    sizes = remote.sizes()
    assert all(name.endswith(".npy") for name, _ in web.asked if name.startswith("train"))
    assert everything(remote) == everything(source(web.folder).open(tmp_path / "a", "train"))
    assert (sizes == source(web.folder).open(tmp_path / "a", "train").sizes()).all()


def test_a_stale_index_beside_a_shard_is_not_believed(web, tmp_path):
    source(web.folder).open(tmp_path / "a", "train").write_sidecars()
    write(web.folder / "train-001.tar", samples(90, first=200))
    assert source(web.address).open(tmp_path / "b", "train").read(4).key == "0200"


@pytest.mark.parametrize("trouble", [503, 429, "cut"])
def test_what_passes_is_tried_again(web, tmp_path, trouble):
    remote = source(web.address).open(tmp_path, "train")
    left = [trouble] * 3
    web.trouble = lambda handler: left.pop() if left else None
    assert remote.read(7).key == "0007"
    assert not left


def test_what_does_not_pass_is_one_line(web, tmp_path):
    remote = source(web.address).open(tmp_path, "train")
    for trouble, words in (
        (503, "5 attempts failed"),
        ("cut", "5 attempts failed"),
        (403, "cannot be read"),
        ("whole", "the server ignores ranges"),
    ):
        web.asked.clear()
        web.trouble = lambda handler, trouble=trouble: trouble
        with pytest.raises(DataError, match=rf"^{web.address}/train-000\.tar: .*{words}.*; .*") as error:
            remote.read(1)
        assert "\n" not in str(error.value)
        assert len(web.asked) == (5 if "attempts" in words else 1)
    (web.folder / "train-002.tar").unlink()
    web.trouble = lambda handler: None
    with pytest.raises(DataError, match=r"train-002\.tar: cannot be read: no such file"):
        remote.read(11)


def test_a_server_that_dies(web, tmp_path):
    remote = source(web.address).open(tmp_path, "train")
    web.shutdown()
    web.server_close()
    with pytest.raises(
        DataError, match=rf"^{web.address}/train-000\.tar: cannot be read, 5 attempts failed: .*; see that it can be"
    ):
        remote.read(0)
    with pytest.raises(DataError, match=rf"{web.address}: cannot be read, 5 attempts failed"):
        source(web.address).open(tmp_path, "train")


def test_no_shards_there(web, tmp_path):
    with pytest.raises(DataError, match=r"no shard matches data\.train='x-\*'"):
        source(web.address, train="x-*").open(tmp_path, "train")
    with pytest.raises(DataError, match=r"train-9\.tar: cannot be read: no such file"):
        source(web.address, train="train-{9..9}.tar").open(tmp_path, "train")


def version(web, name):
    return places.version(Address(f"{web.address}/{name}"), "")


def copied(folder):
    return sorted(path.stem.rpartition("-")[0] for path in folder.glob("*.tar"))


def test_copies_are_bounded_and_the_longest_unused_goes(web, tmp_path):
    size = version(web, "train-000.tar").bytes
    copies = Copies(tmp_path / "copies", limit=2 * size + 100)

    def use(i):
        address = Address(f"{web.address}/train-{i:03d}.tar")
        data = copies.read(address, version(web, address.name), 0, 100, "")
        assert data == (web.folder / address.name).read_bytes()[:100]
        time.sleep(0.02)  # times of use that differ

    for i in (0, 1, 0, 2):
        use(i)
    assert copied(copies.folder) == ["train-000", "train-002"]
    asked = len([a for a in web.asked if a[0].startswith("train-000")])
    use(0)
    assert len([a for a in web.asked if a[0].startswith("train-000")]) == asked  # still here
    with pytest.raises(DataError, match=r"more than data\.cache_gb=.*; raise it"):
        Copies(tmp_path / "small", limit=10).fetch(Address(f"{web.address}/train-000.tar"), version(web, "train-000.tar"), "")


def test_a_copy_that_breaks_leaves_nothing_and_a_killed_one_is_cleared(web, tmp_path):
    address, copies = Address(f"{web.address}/train-000.tar"), Copies(tmp_path / "copies", limit=10**6)
    web.trouble = lambda handler: 503
    with pytest.raises(DataError, match="5 attempts failed"):
        copies.fetch(address, version(web, address.name), "try again")
    assert not list(copies.folder.glob("*.part")) and not list(copies.folder.glob("*.tar"))
    web.trouble = lambda handler: None
    (copies.folder / "train-009-00.part").write_bytes(bytes(10**6))  # as a killed process leaves it: nobody holds its lock
    copies.fetch(address, version(web, address.name), "")
    assert copied(copies.folder) == ["train-000"]
    assert not list(copies.folder.glob("*.part"))


def test_a_copy_that_goes_before_it_is_opened_is_fetched_again(web, tmp_path, monkeypatch):
    """Indexing, where another process needs the room at once."""
    fetch, gone = Copies.fetch, []

    def and_gone(self, place, version_, remedy):
        path = fetch(self, place, version_, remedy)
        if place.name not in gone:
            gone.append(place.name)
            path.unlink()
        return path

    monkeypatch.setattr(Copies, "fetch", and_gone)
    shards = source(web.address, cache_gb=1).open(tmp_path, "train")
    assert len(gone) == 3
    assert len(everything(shards)) == 12


def _read(arguments):
    copies, address, version_ = arguments
    return copies.read(address, version_, 0, version_.bytes, "")


def test_processes_share_copies(web, tmp_path):
    """Eight readers at once: every shard is fetched once."""
    addresses = [Address(f"{web.address}/train-{i:03d}.tar") for i in (0, 1)]
    copies = Copies(tmp_path / "copies", limit=10**6)
    jobs = [(copies, a, version(web, a.name)) for a in addresses] * 4
    web.asked.clear()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_read, jobs)
    assert found == [(web.folder / a.name).read_bytes() for _, a, _ in jobs]
    assert len([a for a in web.asked if a[0].startswith("train-")]) == 2


def test_a_cache_that_would_fetch_for_ever_is_refused(web, tmp_path):
    one = version(web, "train-000.tar").bytes / 1e9
    with pytest.raises(DataError, match=r"data\.cache_gb=.*are in use at a time; raise it, shuffle fewer shards together"):
        source(web.address, cache_gb=2.1 * one).open(tmp_path, "train")
    windowed = source(web.address, cache_gb=2.1 * one, window=1).open(tmp_path, "train")
    shards = np.searchsorted([4, 8, 12], windowed.deck(0).part(0), side="right")
    assert (np.diff(shards) != 0).sum() == 2  # one shard after the other
    assert len(everything(windowed)) == 12


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["data.path=https://me:secret@example.org/x"], "holds a password"),
        (["data.window=0"], "data.window=0: must be above 0"),
        (["data.cache_gb=-1"], "data.cache_gb=-1.0: must be 0 or above"),
    ],
)
def test_bad_settings_are_one_line(lines, words):
    with pytest.raises(ConfigError, match=words) as error:
        compose(["data=webdataset", *lines])
    assert "secret" not in str(error.value)
