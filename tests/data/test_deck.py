"""What a run is dealt: permutations, windows of shards, shares of a mixture; each a pure function of seed and sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import samples, write

from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data.crop import ArbConfig
from hdm.data.deck import Mixture, Shuffled, Windowed
from hdm.data.loader import training_batches
from hdm.data.order import BucketOrder, Order
from hdm.data.shards import Shard, Shards
from hdm.data.sources.mixture import Mixed, MixtureSource, PartConfig

BLOCK = 4096


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None)
def test_windows_use_few_shards_and_every_record_once(lengths, window, seed):
    ends = np.cumsum(lengths)
    part = Windowed(seed, ends, window=window).part(3)
    assert sorted(part) == list(range(sum(lengths)))
    shards = np.searchsorted(ends, part, side="right")
    last = {shard: place for place, shard in enumerate(shards)}
    first = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    for place in range(len(part)):  # shards in use: begun, and not yet done
        assert sum(first[s] <= place <= last[s] for s in last) <= window


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 20)), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_shares_are_kept_and_every_source_has_its_own_epochs(sets, seed, block):
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    decks = [Shuffled(seed, size, purpose=f"order/{k}") for k, size in enumerate(sizes)]
    offsets = [0, *np.cumsum(sizes)[:-1]]
    mixture = Mixture(seed, decks, offsets=offsets, weights=weights)
    stream = mixture.span(0, (block + 1) * BLOCK)
    for k, (deck, offset) in enumerate(zip(decks, offsets)):
        own = stream[(stream >= offset) & (stream < offset + sizes[k])] - offset
        assert abs(len(own) - len(stream) * weights[k] / sum(weights)) < len(sets)
        assert (own == deck.span(0, len(own))).all()  # its own epochs, one after the other
        for epoch in range(len(own) // sizes[k]):
            assert sorted(own[epoch * sizes[k] : (epoch + 1) * sizes[k]]) == list(range(sizes[k]))


def test_a_mixture_can_be_entered_anywhere():
    decks = [Shuffled(0, 7, purpose="order/a"), Shuffled(0, 1000, purpose="order/b")]
    mixture = Mixture(0, decks, offsets=[0, 7], weights=[1, 3])
    whole = mixture.span(0, 3 * BLOCK)
    for first, count in ((0, 1), (5, 9), (BLOCK - 1, 2), (BLOCK, 1), (2 * BLOCK + 17, 300)):
        assert (mixture.span(first, count) == whole[first : first + count]).all()
        order = Order(0, 1007, deck=mixture)
        assert [order[i] for i in range(first, first + count)] == list(whole[first : first + count])


def test_inside_a_block_the_sources_come_at_random():
    """Runs of one source are as long as coin tosses make them: 1,024 of 4,096 changes of hands are expected at 1 : 1."""
    decks = [Shuffled(0, 100, purpose=f"order/{k}") for k in range(2)]
    owners = Mixture(0, decks, offsets=[0, 100], weights=[1, 1]).span(0, BLOCK) >= 100
    changes = int((owners[1:] != owners[:-1]).sum())
    assert abs(changes - BLOCK / 2) < 6 * np.sqrt(BLOCK) / 2


def test_another_source_changes_no_source_s_own_order():
    a, b, c = (Shuffled(0, 50, purpose=f"order/{name}") for name in "abc")
    two = Mixture(0, [a, b], offsets=[0, 50], weights=[1, 1]).span(0, BLOCK)
    three = Mixture(0, [a, b, c], offsets=[0, 50, 100], weights=[1, 1, 2]).span(0, BLOCK)
    first, again = two[two < 50], three[three < 50]
    assert (first[: len(again)] == again).all()


@given(st.integers(1, 7), st.integers(0, 50), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_buckets_of_a_mixture(batch, start, seed):
    """Each part of the deck is rearranged: the same records, micro-batches of one bucket, and a resumed run finds the same."""
    decks = [Shuffled(seed, 30, purpose="order/a"), Shuffled(seed, 11, purpose="order/b")]
    mixture = Mixture(seed, decks, offsets=[0, 30], weights=[2, 1])
    buckets = np.arange(41) % 3

    def stream(first, count):
        order = BucketOrder(seed, buckets, boxes=[(16, 16)] * 3, start=start, batch_size=batch, deck=mixture)
        return [(order[i], order.box(f)) for f in range(first, first + count, batch) for i in range(f, f + batch)]

    steps = 4200 // batch
    whole = stream(start, steps * batch)
    later = start + steps // 2 * batch
    assert stream(later, 3 * batch) == whole[later - start : later - start + 3 * batch]
    order = BucketOrder(seed, buckets, boxes=[(16, 16)] * 3, start=start, batch_size=batch, deck=mixture)
    assert sorted(order[i] for i in range(mixture.length)) == sorted(mixture.part(0))


@given(st.data(), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_deck_of_chosen_records_keeps_the_law(data, seed):
    """Permutations of the chosen alone; shards in few windows at a time; shares among the sources that have any left."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    total, ends = sum(lengths), np.cumsum(lengths)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total).filter(any)))
    records = np.flatnonzero(kept)
    plain, windowed = Shuffled(seed, total).chosen(kept), Windowed(seed, ends, window=1).chosen(kept)
    for number in (0, 3):
        assert sorted(plain.part(number)) == sorted(windowed.part(number)) == records.tolist()
        owners = np.searchsorted(ends, windowed.part(number), side="right")
        assert (owners[1:] != owners[:-1]).sum() == len(set(owners)) - 1  # one shard, then the next
    again = np.arange(total) == records[-1]
    assert plain.chosen(again).part(2).tolist() == windowed.chosen(again).part(2).tolist() == [records[-1]]

    decks = [Shuffled(seed, length, purpose=f"order/{k}") for k, length in enumerate(lengths)]
    weights = list(range(1, len(lengths) + 1))
    mixture = Mixture(seed, decks, offsets=[0, *ends[:-1]], weights=weights).chosen(kept)
    stream = mixture.span(0, BLOCK)
    assert set(stream) == set(records)
    owners, left = np.searchsorted(ends, stream, side="right"), set(np.searchsorted(ends, records, side="right"))
    for k in left:
        assert abs((owners == k).sum() - BLOCK * weights[k] / sum(weights[j] for j in left)) < len(lengths)


def opened(folder, name, content):
    parts = [content[i : i + 5] for i in range(0, len(content), 5)]
    paths = [write(folder / name / f"train-{i:03d}.tar", part) for i, part in enumerate(parts)]
    return Shards([Shard(path) for path in paths], name=name, index_folder=folder / "index", remedy="copy it again")


@pytest.fixture
def mixed(tmp_path):
    parts = [opened(tmp_path, "big", samples(12)), opened(tmp_path, "small", samples(3, first=500))]
    return Mixed(parts, names=["big", "small"], weights=[1.0, 3.0])


def keys(run, shards, *, start, count, workers=0):
    run.train.workers = workers
    batches = training_batches(run, shards, start=start, batch_size=4)
    found = [key for _ in range(count) for key in next(batches).keys]
    batches.close()
    return found


def test_batches_of_a_mixture(run, mixed):
    assert len(mixed) == 15
    assert {mixed.read(i).key for i in range(15)} == {f"big/{i:04d}" for i in range(12)} | {
        f"small/{i:04d}" for i in (500, 501, 502)
    }
    whole = keys(run, mixed, start=0, count=10)
    assert keys(run, mixed, start=16, count=4) == whole[16:32]
    assert keys(run, mixed, start=0, count=10, workers=2) == whole
    run.crop = ArbConfig(size=16, step=4)
    assert {key.partition("/")[0] for key in keys(run, mixed, start=0, count=6)} == {"big", "small"}
    assert mixed.sizes().shape == (15, 2)


def test_the_digest_covers_sources_and_weights(tmp_path):
    parts = [opened(tmp_path, "a", samples(2)), opened(tmp_path, "b", samples(2, first=9))]
    made = [
        Mixed(p, names=n, weights=w).digest
        for p, n, w in [
            (parts, ["a", "b"], [1.0, 1.0]),
            (parts, ["a", "b"], [1.0, 2.0]),
            (parts, ["a", "c"], [1.0, 1.0]),
            (parts[::-1], ["a", "b"], [1.0, 1.0]),
        ]
    ]
    assert len(set(made)) == 4


def mixture(*parts):
    from hdm.data.sources.mixture import MixtureConfig

    return MixtureSource(MixtureConfig(sources=list(parts)))


def test_from_the_configuration(tmp_path):
    for name, first in (("a", 0), ("b", 50)):
        write(tmp_path / name / "0.tar", samples(4, first=first))
    write(tmp_path / "a" / "val-0.tar", samples(2, first=90))
    lines = {name: ["data=webdataset", f"data.path={tmp_path / name}"] for name in "ab"}
    source = mixture(PartConfig(name="a", set=lines["a"]), PartConfig(name="b", weight=2, set=lines["b"], validate=False))
    assert len(source.open(tmp_path / "datasets", "train")) == 8
    assert len(source.open(tmp_path / "datasets", "val")) == 2
    with pytest.raises(DataError, match=r"data\.sources\[1\] 'b': .*no shard matches data\.val.*or set validate: false for it"):
        mixture(PartConfig(name="a", set=lines["a"]), PartConfig(name="b", set=lines["b"])).open(tmp_path, "val")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[]", "data.sources: is empty"),
        ("[{name: a, weight: 0}]", "weight=0.0: must be above 0"),
        ("[{name: a}, {name: a}]", r"data.sources\[1\].name=a: is that of another"),
        ("[{weight: 1}]", r"data.sources\[0\].name: is empty"),
        ("[{name: a, set: ['merge=concat']}]", "merge=concat is not about data"),
        ("[{name: a, set: ['data=openmojy']}]", "'a': data=openmojy: no such variant; did you mean 'openmoji'"),
        ("[{name: a, set: ['data=mixture']}]", "a mixture in a mixture"),
        ("[{name: a, validate: false}]", "validate=false for every one"),
    ],
)
def test_bad_sources_are_one_line(sources, words):
    with pytest.raises(ConfigError, match=words) as error:
        compose(["data=mixture", f"data.sources={sources}"])
    assert "\n" not in str(error.value)
