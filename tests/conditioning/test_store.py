"""The store: what goes in comes out, in any order, from any number of processes, and what does not fit is refused by name."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from hdm.conditioning.store import INDEX, Part, Place, Store, Sums, differences, fill, key
from hdm.config.errors import DataError

PARTS, ROWS = 5, 3


def place_of(root, **settings):
    return Place(axis="autoencoder", root=root, name="kl", settings={"data": "1f0c", "crop.size": 64, **settings})


def value(number, row):
    return torch.full((2, 2), 10.0 * number + row)


def make(number):
    """Part `number`: fixed tensors whose values name their entry."""
    mean = torch.stack([value(number, row) for row in range(ROWS)])
    sums = Sums.of(mean.flatten(1))
    return Part(keys=[key(f"{number}/{row}".encode()) for row in range(ROWS)], tensors={"mean": mean}, sums=sums)


def slowly(root, out):
    made = []

    def tell(number):
        time.sleep(0.05)
        made.append(number)
        return make(number)

    fill(place_of(root), PARTS, tell, done=lambda _: None)
    out.put(made)


def killed_in(root, number):
    """Makes parts until `number`, in which it is killed."""

    def tell(current):
        if current == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(current)

    fill(place_of(root), PARTS, tell, done=lambda _: None)


def test_every_entry_is_found_again(tmp_path):
    told = []
    fill(place_of(tmp_path), PARTS, make, done=told.append)
    assert told == list(range(PARTS))
    store = Store(place_of(tmp_path))
    names = [(number, row) for number in (3, 0, 4, 1, 2) for row in (2, 0, 1)]
    entries = store.find([key(f"{number}/{row}".encode()) for number, row in names])
    for (number, row), entry in zip(names, entries, strict=True):
        assert torch.equal(store.read(entry)["mean"], value(number, row))
    assert store.find([key(b"5/0"), key(b"0/0")]) == [None, 0]
    store.verify()


def test_entries_of_different_length(tmp_path):
    rows = [torch.arange(6.0).view(3, 2), torch.full((1, 2), 9.0), torch.zeros(2, 2)]

    def ragged(number):
        return Part(keys=[key(bytes([number, i])) for i in range(3)], tensors={"states": torch.cat(rows) + number}, ends=[3, 4, 6])

    fill(place_of(tmp_path), 2, ragged, done=lambda _: None)
    store = Store(place_of(tmp_path))
    for number in range(2):
        for i, row in enumerate(rows):
            (entry,) = store.find([key(bytes([number, i]))])
            assert torch.equal(store.read(entry)["states"], row + number)


def test_keys_that_end_in_zeros_are_told_apart(tmp_path):
    """Names in numpy lose their trailing zero bytes."""
    keys = [bytes(16), b"a" + bytes(15), b"a" * 15 + b"\0", b"a" * 16, bytes(15) + b"a"]
    fill(place_of(tmp_path), 1, lambda _: Part(keys=keys, tensors={"mean": torch.arange(5.0)}), done=lambda _: None)
    store = Store(place_of(tmp_path))
    assert [store.read(entry)["mean"].item() for entry in store.find(keys)] == [0, 1, 2, 3, 4]
    assert store.find([b"a" * 14 + bytes(2)]) == [None]


def test_statistics_are_those_of_all_values(tmp_path):
    index = fill(place_of(tmp_path), PARTS, make, done=lambda _: None)
    values = (
        np.stack([make(number).tensors["mean"].flatten(1).numpy() for number in range(PARTS)]).reshape(-1, 4).astype(np.float64)
    )
    assert index["statistics"]["count"] == PARTS * ROWS
    np.testing.assert_allclose(index["statistics"]["mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(index["statistics"]["std"], values.std(0), rtol=1e-12)
    assert json.loads((place_of(tmp_path).folder / INDEX).read_text()) == index


def test_the_variance_of_a_distribution_is_between_and_within():
    mean, variance = torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [2.0]])
    assert Sums.of(mean, variance=variance).summary() == {"count": 2, "mean": [2.0], "std": [2.0]}  # 1 + (4 + 2) / 2


def test_two_processes_share_the_parts(tmp_path):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=slowly, args=(tmp_path, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    made = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(made[0] + made[1]) == list(range(PARTS)), "every part once"
    assert all(made), "both had work"
    assert sorted(path.name for path in place_of(tmp_path).folder.iterdir()) == [
        ".lock", INDEX, *(f"part-{number:06d}.safetensors" for number in range(PARTS))
    ]  # fmt: skip


def test_a_killed_fill_goes_on_where_it_was(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=killed_in, args=(tmp_path, 3))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(
        DataError, match=r"^autoencoder.cache: .*kl-\w+ is not complete, 3 parts are there; fill one with the words"
    ):
        Store(place_of(tmp_path))
    made = []
    fill(place_of(tmp_path), PARTS, lambda number: (made.append(number), make(number))[1], done=lambda _: None)
    assert made == [3, 4]
    assert len(Store(place_of(tmp_path)).find([])) == 0


def test_a_full_disk_leaves_no_half_part(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hdm.conditioning.store.save_file", full)
    with pytest.raises(
        DataError, match=r"part-000000.safetensors: cannot be written: .*No space left.*; make room or set cache=FOLDER"
    ):
        fill(place_of(tmp_path), PARTS, make, done=lambda _: None)
    assert not list(place_of(tmp_path).folder.glob("part-*.safetensors*"))


def test_another_run_is_told_what_differs(tmp_path):
    with pytest.raises(DataError, match=rf"autoencoder.cache: there is none in {tmp_path}; fill one"):
        Store(place_of(tmp_path))
    fill(place_of(tmp_path), 1, make, done=lambda _: None)
    fill(place_of(tmp_path, data="beef", **{"crop.size": 32}), 1, make, done=lambda _: None)
    with pytest.raises(
        DataError, match=r"holds none for this run; the nearest, kl-\w+, differs in crop.size \(64 there, 128 here\); fill"
    ) as e:
        Store(place_of(tmp_path, **{"crop.size": 128}))
    assert "\n" not in str(e.value)


def test_a_folder_under_a_wrong_name_is_refused(tmp_path):
    fill(place_of(tmp_path), 1, make, done=lambda _: None)
    other = place_of(tmp_path, data="beef")
    place_of(tmp_path).folder.rename(other.folder)
    with pytest.raises(DataError, match=r"was made for another run: data \(1f0c there, beef here\); fill"):
        Store(other)


def test_differences_name_what_one_side_lacks():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": None}) == ["c (nothing there, None here)", "b (2 there, nothing here)"]
    assert differences({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize("damage", ["shorter", "missing", "changed", "index", "format"])
def test_damage_is_found(tmp_path, damage):
    place = place_of(tmp_path)
    fill(place, 2, make, done=lambda _: None)
    part, index = place.part(1), place.folder / INDEX
    if damage == "shorter":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "missing":
        part.unlink()
    elif damage == "changed":
        part.write_bytes(part.read_bytes()[:-1] + b"\1")
    elif damage == "index":
        index.write_text("{")
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))
    message = {"index": "is no JSON", "format": "has format 99, 1 is read here", "changed": "SHA-256"}.get(
        damage, "missing or damaged"
    )
    with pytest.raises(DataError, match=message):
        Store(place).verify()


def test_a_store_without_settings_of_its_own_is_another(tmp_path):
    place = place_of(tmp_path)
    assert replace(place, settings={"crop.size": 64, "data": "1f0c"}).folder == place.folder, "whatever the order"
    assert replace(place, settings={"data": "1f0c"}).folder != place.folder
