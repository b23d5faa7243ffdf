"""Order is a function: its laws are checked on small numbers, and golden values pin it for good."""

from __future__ import annotations

import pickle
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.sampler import Order, permutation

ORDERS = st.builds(
    Order,
    seed=st.integers(0, 2**63 - 1),
    counts=st.lists(st.integers(1, 23), min_size=1, max_size=5).map(tuple),
    batch_size=st.integers(1, 9),
)
law = settings(max_examples=50, deadline=None)


def epoch(order: Order, number: int) -> list[tuple[int, tuple[int, ...]]]:
    return [order.batch(index) for index in range(order.batches_before_epoch(number), order.batches_before_epoch(number + 1))]


@law
@given(ORDERS)
def test_every_sample_comes_exactly_once_per_lap(order: Order) -> None:
    for bucket, count in enumerate(order.counts):
        stream = [item for batch in range(count) for item in order._bucket_batch(bucket, batch)]
        laps = [stream[start : start + count] for start in range(0, len(stream), count)]
        assert all(sorted(lap) == list(range(count)) for lap in laps)


@law
@given(ORDERS)
def test_after_any_epoch_all_samples_of_a_bucket_have_come_equally_often_but_for_one(order: Order) -> None:
    seen = [Counter(dict.fromkeys(range(count), 0)) for count in order.counts]
    for number in range(order.batch_size):
        for bucket, items in epoch(order, number):
            seen[bucket].update(items)
        assert all(max(counter.values()) - min(counter.values()) <= 1 for counter in seen)
    assert all(set(counter.values()) == {order.batch_size} for counter in seen)


@law
@given(ORDERS, st.integers(0, 10**12))
def test_no_batch_is_short_and_none_mixes_buckets(order: Order, index: int) -> None:
    bucket, items = order.batch(index)
    assert len(items) == order.batch_size
    assert all(0 <= item < order.counts[bucket] for item in items)


@law
@given(ORDERS, st.integers(0, 50))
def test_an_epoch_has_the_batches_that_the_grid_gives_each_bucket(order: Order, number: int) -> None:
    found = Counter(bucket for bucket, _ in epoch(order, number))
    for bucket, count in enumerate(order.counts):
        assert found[bucket] == (number + 1) * count // order.batch_size - number * count // order.batch_size


@law
@given(ORDERS, st.integers(0, 10**15))
def test_the_epoch_of_a_batch_is_the_one_it_lies_in(order: Order, index: int) -> None:
    number = order.epoch_of(index)
    assert order.batches_before_epoch(number) <= index < order.batches_before_epoch(number + 1)


@law
@given(ORDERS, st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_what_was_asked_before_does_not_matter(order: Order, indices: list[int]) -> None:
    asked = {index: order.batch(index) for index in indices}
    assert all(Order(order.seed, order.counts, order.batch_size).batch(index) == batch for index, batch in asked.items())
    assert pickle.loads(pickle.dumps(order)).batch(indices[0]) == asked[indices[0]]


def test_any_start_is_reached_at_once() -> None:
    counts = tuple(range(1000, 3000, 50))
    for index in (0, 10**6, 10**9, 10**15):
        order = Order(0, counts, 16)
        start = time.perf_counter()
        order.batch(index)
        assert time.perf_counter() - start < 0.5


def test_only_the_last_laps_are_remembered() -> None:
    order = Order(0, (7, 9), 4)
    for index in range(500):
        order.batch(index)
    assert len(order._memory) <= 2 * (1 + len(order.counts))
    assert Order(0, (7, 9), 4) == order
    assert len(pickle.dumps(order)) < 500


def test_epochs_laps_buckets_and_seeds_have_orders_of_their_own() -> None:
    order, other = Order(0, (40, 40), 4), Order(1, (40, 40), 4)
    laps = [tuple(order._permutation(f"lap/{bucket}", lap, 40)) for bucket in (0, 1) for lap in (0, 1)]
    assert len({*laps, tuple(other._permutation("lap/0", 0, 40))}) == 5
    assert len({tuple(bucket for bucket, _ in epoch(order, number)) for number in range(5)}) == 5


def test_batches_are_put_together_anew_every_lap() -> None:
    order = Order(3, (64,), 8)
    first, second = ({frozenset(items) for _, items in epoch(order, number)} for number in (0, 1))
    assert len(first) == len(second) == 8
    assert not first & second


def test_a_bucket_smaller_than_a_batch_still_fills_it() -> None:
    order = Order(0, (3,), 8)
    assert order.batches_before_epoch(1) == 0
    assert order.epoch_of(0) == 2
    assert Counter(item for index in range(3) for item in order.batch(index)[1]) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize(("counts", "batch_size"), [((), 1), ((4, 0), 2), ((4,), 0), ((-1,), 1)])
def test_impossible_orders_are_refused(counts: tuple[int, ...], batch_size: int) -> None:
    with pytest.raises(ValueError, match="cannot order"):
        Order(0, counts, batch_size)


def test_there_is_no_batch_before_the_first() -> None:
    with pytest.raises(ValueError, match="no batch -1"):
        Order(0, (4,), 2).batch(-1)


def test_golden_values() -> None:
    assert permutation(0, "epoch", 0, 8).tolist() == [3, 2, 0, 6, 4, 7, 5, 1]
    order = Order(seed=20240917, counts=(5, 9), batch_size=4)
    assert [order.batch(index) for index in range(7)] == [
        (0, (3, 1, 0, 4)),  # epoch 0: one batch of bucket 0, whose sample 2 is left for the next
        (1, (3, 4, 2, 5)),
        (1, (6, 1, 7, 0)),  # sample 8 is left
        (1, (8, 3, 4, 2)),  # epoch 1 begins with it
        (0, (2, 3, 0, 1)),
        (1, (5, 8, 7, 0)),
        (1, (2, 3, 6, 0)),
    ]
    assert order.batch(123_456_789) == (0, (4, 3, 0, 2))
