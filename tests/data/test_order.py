"""Which samples share a micro-batch: every record once an epoch, one bucket a micro-batch, from any start."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm.data.order import SQUARE, BucketOrder, DrawnOrder, Order, deal
from hdm.rng import generator

BUCKETS = st.lists(st.integers(SQUARE, 3), min_size=1, max_size=60).map(np.array)
BOXES = [(16, 16), (12, 20), (20, 12), (8, 32)]


@given(BUCKETS, st.integers(1, 7), st.integers(0, 6), st.integers(0, 10**6))
@settings(max_examples=300)
def test_dealing(buckets, batch, head, seed):
    head = min(head % batch, len(buckets))
    places, used = deal(buckets, head=head, batch=batch, shuffle=np.random.default_rng(seed))
    assert sorted(places) == list(range(len(buckets)))
    tail = (len(buckets) - head) % batch
    assert (used[:head] == SQUARE).all()
    assert (used[len(used) - tail :] == SQUARE).all()
    for chunk in np.split(np.arange(head, len(buckets) - tail), max((len(buckets) - head) // batch, 1)):
        assert len(set(used[chunk])) <= 1
    kept = used != SQUARE
    assert (used[kept] == buckets[places[kept]]).all()
    # no more squares than there must be: what full micro-batches leave over, and one micro-batch given up for the ends
    counts = np.bincount(buckets[buckets >= 0])
    over = (buckets == SQUARE).sum() + (counts % batch).sum()
    assert (~kept).sum() in {over, over + batch}
    assert (~kept).sum() == over or over < head + tail


def stream(seed, buckets, *, start, batch, count, phase=None):
    order = BucketOrder(seed, buckets, boxes=BOXES, start=start if phase is None else phase, batch_size=batch)
    return [(order[i], order.box(first)) for first in range(start, start + count, batch) for i in range(first, first + batch)]


@given(BUCKETS, st.integers(1, 7), st.integers(0, 50), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_record_once_an_epoch_and_one_size_a_micro_batch(buckets, batch, start, seed):
    size = len(buckets)
    begin = -start % size  # the first sample of an epoch
    count = -(-(begin + 3 * size) // batch) * batch
    records = [record for record, _ in stream(seed, buckets, start=start, batch=batch, count=count)][begin:]
    for epoch in range(3):
        assert sorted(records[epoch * size : (epoch + 1) * size]) == list(range(size))
    order = BucketOrder(seed, buckets, boxes=BOXES, start=start, batch_size=batch)
    for first in range(start, start + count, batch):
        boxes = {order.box(i) for i in range(first, first + batch)}
        assert len(boxes) == 1
        (box,) = boxes
        assert box is None or {int(buckets[order[i]]) for i in range(first, first + batch)} == {BOXES.index(box)}


@given(BUCKETS, st.integers(1, 6), st.integers(0, 20), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_going_on_after_whole_steps_is_going_on(buckets, batch, start, steps, seed):
    whole = stream(seed, buckets, start=start, batch=batch, count=12 * batch)
    later = start + steps * batch
    assert stream(seed, buckets, start=later, batch=batch, count=3 * batch) == whole[steps * batch : (steps + 3) * batch]


def test_epochs_and_seeds_differ():
    buckets = np.arange(40) % 4
    epochs = [tuple(stream(seed, buckets, start=start, batch=4, count=40)) for seed in (0, 1) for start in (0, 40)]
    assert len(set(epochs)) == 4
    firsts = [BucketOrder(0, buckets, boxes=BOXES, start=0, batch_size=4).box(40 * epoch) for epoch in range(30)]
    assert set(BOXES) <= set(firsts)  # none comes first each time


def test_stand_ins_come_from_the_bucket_first():
    buckets = np.array([0] * 8 + [1] * 8 + [SQUARE] * 4)
    order = BucketOrder(0, buckets, boxes=BOXES, start=0, batch_size=4)
    for sample in range(20):
        box = order.box(sample)
        found = {int(buckets[order.replacement(sample, attempt)]) for attempt in range(1, 26)}
        assert found == ({BOXES.index(box)} if box else {0, 1, SQUARE})
        assert len({int(buckets[order.replacement(sample, attempt)]) for attempt in range(26, 60)}) == 3


def test_the_plain_order_has_no_boxes():
    assert {Order(0, 5).box(first) for first in range(10)} == {None}


def test_drawn_boxes_have_their_shares():
    shares = [0.5, 0.3, 0.2]
    order = DrawnOrder(3, 10, boxes=BOXES[:3], shares=shares)
    drawn = [BOXES.index(order.box(first)) for first in range(0, 4 * 6000, 4)]
    counts = np.bincount(drawn) / 6000
    assert np.abs(counts - shares).max() < 6 * np.sqrt(0.25 / 6000)
    again = DrawnOrder(3, 10, boxes=BOXES[:3], shares=shares)
    assert [BOXES.index(again.box(first)) for first in range(800, 1600, 4)] == drawn[200:400]
    assert [order[i] for i in range(30)] == [Order(3, 10)[i] for i in range(30)]  # the records are those of any crop
    assert {DrawnOrder(0, 10, boxes=BOXES[:1], shares=[1.0]).box(i) for i in range(50)} == {BOXES[0]}


def test_arranging_many_records_is_quick():
    buckets = generator(0, "test").integers(SQUARE, 40, 1_000_000)
    order = BucketOrder(0, buckets, boxes=[(16, 16)] * 40, start=0, batch_size=32)
    assert len({order[i] for i in itertools.chain(range(1000), range(999_000, 1_000_000))}) == 2000
