"""Order is a function: its laws are checked on small numbers, and golden values pin it for good."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.sampler import Group, Order, lap, permutation

HALF = Fraction(1, 2)
FRACTIONS = st.builds(Fraction, st.integers(1, 11), st.integers(1, 6))
GROUPS = st.builds(Group, st.integers(1, 12), st.one_of(st.just(Fraction(1)), st.integers(1, 4), FRACTIONS))
LARGE_GROUPS = st.builds(Group, st.integers(50, 200), FRACTIONS)
BUCKETS = st.lists(GROUPS, min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**63 - 1)
ORDERS = st.builds(Order, seed=SEEDS, buckets=st.lists(BUCKETS, min_size=1, max_size=4).map(tuple), batch_size=st.integers(1, 9))
law = settings(max_examples=50, deadline=None)


def plain(*counts: int) -> tuple[tuple[Group, ...], ...]:
    return tuple((Group(count),) for count in counts)


def epoch(order: Order, number: int) -> list[tuple[int, tuple[int, ...]]]:
    return [order.batch(index) for index in range(order.batches_before_epoch(number), order.batches_before_epoch(number + 1))]


def laps(order: Order, bucket: int, count: int) -> list[list[int]]:
    return [lap(order.seed, bucket, order.buckets[bucket], number).tolist() for number in range(count)]


def members(groups: tuple[Group, ...]) -> list[tuple[int, Group]]:
    """The group of each row."""
    return [(index, group) for index, group in enumerate(groups) for _ in range(group.count)]


# Laps


@law
@given(SEEDS, BUCKETS, st.integers(1, 20))
def test_every_picture_has_come_its_repeats_rounded_down_or_up_after_any_number_of_laps(
    seed: int, groups: tuple[Group, ...], count: int
) -> None:
    seen: Counter[int] = Counter()
    for number in range(count):
        rows = Counter(lap(seed, 0, groups, number).tolist())
        seen.update(rows)
        for row, (_, group) in enumerate(members(groups)):
            assert math.floor(group.repeats) <= rows[row] <= math.ceil(group.repeats)
            assert math.floor((number + 1) * group.repeats) <= seen[row] <= math.ceil((number + 1) * group.repeats)
    assert sum(seen.values()) == sum(math.floor(group.count * count * group.repeats) for group in groups)
    assert set(seen) <= set(range(len(members(groups))))


@law
@given(SEEDS, GROUPS, st.integers(0, 10**12))
def test_as_many_laps_as_the_denominator_show_each_picture_the_same_number_of_times(seed: int, group: Group, first: int) -> None:
    seen: Counter[int] = Counter()
    for number in range(first, first + group.repeats.denominator):
        seen.update(lap(seed, 0, (group,), number).tolist())
    assert seen == dict.fromkeys(range(group.count), group.repeats.numerator)


def test_half_repeats_show_half_of_the_pictures_and_then_the_others() -> None:
    first, second = (set(lap(0, 0, (Group(100, HALF),), number).tolist()) for number in (0, 1))
    assert len(first) == len(second) == 50
    assert first | second == set(range(100))
    assert np.mean(sorted(first)) == pytest.approx(49.5, abs=12)  # and not the first half of the list


def test_whole_repeats_are_so_many_shuffles_one_after_the_other() -> None:
    rows = lap(0, 0, (Group(7, 3),), 4).reshape(3, 7)
    assert (np.sort(rows) == np.arange(7)).all()
    assert len({tuple(part) for part in rows.tolist()}) == 3


@law
@given(SEEDS, st.lists(LARGE_GROUPS, min_size=2, max_size=4).map(tuple), st.integers(0, 10**6), st.data())
def test_groups_keep_their_ratio_in_every_stretch_of_a_lap(seed: int, groups: tuple[Group, ...], number: int, data: st.DataObject) -> None:
    of = [index for index, _ in members(groups)]
    rows = [of[row] for row in lap(seed, 0, groups, number).tolist()]
    start = data.draw(st.integers(0, len(rows)))
    window = rows[start : data.draw(st.integers(start, len(rows)))]
    for index in range(len(groups)):
        share = rows.count(index) / max(1, len(rows))
        assert abs(window.count(index) - share * len(window)) < 2 + 2 * len(groups) * share


def test_a_few_pictures_among_many_come_one_by_one() -> None:
    rows = lap(5, 0, (Group(10_000), Group(100)), 0)
    places = np.flatnonzero(rows >= 10_000)
    assert (places // 101 == np.arange(100)).mean() > 0.9  # one in each hundredth of the lap, but for the borders
    assert np.diff(places).max() <= 203


def test_a_group_is_shuffled_alike_whoever_is_beside_it() -> None:
    alone, beside = lap(1, 0, (Group(20),), 3), lap(1, 0, (Group(20), Group(9, HALF)), 3)
    assert beside[beside < 20].tolist() == alone.tolist()


def test_every_order_is_as_likely_as_any_other() -> None:
    drawn = Counter(tuple(permutation(0, "test", number, 4).tolist()) for number in range(4800))
    assert set(drawn) == set(permutations(range(4)))
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 50  # chi-square with 23 degrees of freedom: p = 0.001


def test_rounds_of_a_permutation_come_one_after_the_other() -> None:
    places = permutation(0, "test", 0, 10, round_length=4).tolist()
    assert [sorted(places[:4]), sorted(places[4:8]), sorted(places[8:])] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_large_permutation_is_one() -> None:
    places = permutation(0, "test", 0, 3_000_000)  # more than is worked on at once
    assert (np.bincount(places) == 1).all()
    assert np.corrcoef(places, np.arange(len(places)))[0, 1] == pytest.approx(0, abs=0.003)


# Batches


@law
@given(ORDERS)
def test_the_batches_of_a_bucket_cut_its_stream_without_leaving_anything_out(order: Order) -> None:
    for bucket in range(len(order.buckets)):
        stream = [row for rows in laps(order, bucket, 12) for row in rows]
        cut = [row for number in range(12) for row in order._rows_of(bucket, number).tolist()]
        assert cut == stream[: len(stream) // order.batch_size * order.batch_size]


@law
@given(ORDERS, st.integers(0, 50))
def test_an_epoch_has_the_batches_that_the_grid_gives_each_bucket(order: Order, number: int) -> None:
    found = Counter(bucket for bucket, _ in epoch(order, number))
    for bucket, groups in enumerate(order.buckets):
        before, after = (sum(math.floor(group.count * end * group.repeats) for group in groups) for end in (number, number + 1))
        assert found[bucket] == after // order.batch_size - before // order.batch_size


@law
@given(ORDERS)
def test_the_batches_of_an_epoch_are_those_of_its_buckets_once_each(order: Order) -> None:
    expected: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for bucket in range(len(order.buckets)):
        rows = order._rows_of(bucket, 3).reshape(-1, order.batch_size)
        expected.update((bucket, tuple(batch)) for batch in rows.tolist())
    assert Counter(epoch(order, 3)) == expected


@law
@given(ORDERS)
def test_whole_repeats_come_out_exactly_where_batches_and_laps_end_together(order: Order) -> None:
    whole = Order(
        order.seed, tuple(tuple(Group(g.count, math.ceil(g.repeats)) for g in bucket) for bucket in order.buckets), order.batch_size
    )
    seen = [Counter({row: 0 for row, _ in enumerate(members(groups))}) for groups in whole.buckets]
    for number in range(whole.batch_size):
        for bucket, rows in epoch(whole, number):
            seen[bucket].update(rows)
    for counter, groups in zip(seen, whole.buckets, strict=True):
        assert counter == {row: whole.batch_size * group.repeats for row, (_, group) in enumerate(members(groups))}


@law
@given(ORDERS, st.integers(0, 10**12))
def test_no_batch_is_short_and_none_mixes_buckets(order: Order, index: int) -> None:
    bucket, rows = order.batch(index)
    assert len(rows) == order.batch_size
    assert all(0 <= row < len(members(order.buckets[bucket])) for row in rows)


@law
@given(ORDERS, st.integers(0, 10**15))
def test_the_epoch_of_a_batch_is_the_one_it_lies_in(order: Order, index: int) -> None:
    number = order.epoch_of(index)
    assert order.batches_before_epoch(number) <= index < order.batches_before_epoch(number + 1)


@law
@given(ORDERS, st.integers(1, 10**9))
def test_samples_per_epoch_are_the_mean(order: Order, count: int) -> None:
    slack = sum(len(groups) + order.batch_size for groups in order.buckets)
    assert 0 <= count * order.samples_per_epoch - order.batch_size * order.batches_before_epoch(count) < slack


@law
@given(ORDERS, st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_what_was_asked_before_does_not_matter(order: Order, indices: list[int]) -> None:
    asked = {index: order.batch(index) for index in indices}
    assert all(Order(order.seed, order.buckets, order.batch_size).batch(index) == batch for index, batch in asked.items())
    assert pickle.loads(pickle.dumps(order)).batch(indices[0]) == asked[indices[0]]


@law
@given(ORDERS)
def test_asking_in_order_and_jumping_give_the_same(order: Order) -> None:
    in_order = [order.batch(index) for index in range(60)]
    assert [Order(order.seed, order.buckets, order.batch_size).batch(index) for index in range(60)] == in_order
    assert [order.batch(index) for index in reversed(range(60))] == in_order[::-1]


def test_a_bucket_smaller_than_a_batch_still_fills_it() -> None:
    order = Order(0, plain(3), 8)
    assert order.batches_before_epoch(1) == 0
    assert order.epoch_of(0) == 2
    assert Counter(row for index in range(3) for row in order.batch(index)[1]) == {0: 8, 1: 8, 2: 8}


def test_a_picture_that_hardly_ever_comes_waits_for_its_batch() -> None:
    order = Order(0, ((Group(1, Fraction(1, 1000)),), (Group(4),)), 4)
    assert [order.batches_before_epoch(number) for number in (1, 3999, 4000)] == [1, 3999, 4001]
    assert [bucket for bucket, _ in epoch(order, 3998)] == [1]
    assert sorted(epoch(order, 3999))[0] == (0, (0, 0, 0, 0))


def test_batches_are_put_together_anew_every_lap() -> None:
    order = Order(3, plain(64), 8)
    first, second = ({frozenset(rows) for _, rows in epoch(order, number)} for number in (0, 1))
    assert len(first) == len(second) == 8
    assert not first & second


def test_epochs_laps_buckets_groups_and_seeds_have_orders_of_their_own() -> None:
    order, other = Order(0, plain(40, 40), 4), Order(1, plain(40, 40), 4)
    orders = [tuple(rows) for bucket in (0, 1) for rows in laps(order, bucket, 2)] + [tuple(laps(other, 0, 1)[0])]
    assert len(set(orders)) == 5
    assert len({tuple(bucket for bucket, _ in epoch(order, number)) for number in range(5)}) == 5
    pair = lap(0, 0, (Group(40), Group(40)), 0)
    assert pair[pair < 40].tolist() != (pair[pair >= 40] - 40).tolist()


# What it takes


def test_any_start_is_reached_at_once() -> None:
    buckets = tuple((Group(count), Group(count // 10, Fraction(1, 3))) for count in range(1000, 3000, 50))
    for index in (0, 10**6, 10**9, 10**15):
        order = Order(0, buckets, 16)
        start = time.perf_counter()
        order.batch(index)
        assert time.perf_counter() - start < 0.5


def test_a_million_pictures_start_at_once() -> None:
    order = Order(0, plain(*[10_000] * 50, 500_000), 16)
    start = time.perf_counter()
    assert {order.batch(index)[0] for index in range(1000)} == set(range(51))
    assert time.perf_counter() - start < 0.8


def test_only_what_an_epoch_needs_is_remembered() -> None:
    order = Order(0, plain(700, 900), 4)
    for index in range(3000):
        order.batch(index)
    assert order._memory.epoch is not None
    held = order._memory.epoch.places.nbytes + sum(part.rows.nbytes + part.rest.nbytes for part in order._memory.stretches.values())
    assert held <= 4 * (1600 + 400 + 2 * 4)
    assert all(part.rest.base is None for part in order._memory.stretches.values())  # it would keep a whole lap alive
    assert Order(0, plain(700, 900), 4) == order
    assert len(pickle.dumps(order)) < 700


@pytest.mark.parametrize(
    ("buckets", "batch_size", "reason"),
    [
        ((), 1, "there is no bucket"),
        (((),), 1, "one without pictures"),
        (plain(4, 0), 2, "one without pictures"),
        (plain(4), 0, "a batch has 0"),
        (plain(-1), 1, "-1 pictures"),
        (((Group(4, 0),),), 1, "with 0 repeats"),
        (((Group(4, 0.1),),), 1, r"with 0\.1 repeats"),  # which is not a tenth
        (plain(2**31), 1, "an epoch would have 2,147,483,648"),
    ],
)
def test_impossible_orders_are_refused(buckets: tuple[tuple[Group, ...], ...], batch_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot order samples: .*{reason}"):
        Order(0, buckets, batch_size)


def test_a_source_may_have_no_picture_in_a_bucket() -> None:
    order = Order(0, ((Group(0, HALF), Group(3), Group(0)),), 3)
    assert sorted(order.batch(0)[1]) == [0, 1, 2]
    assert order.samples_per_epoch == 3


def test_there_is_no_batch_before_the_first() -> None:
    with pytest.raises(ValueError, match="no batch -1"):
        Order(0, plain(4), 2).batch(-1)


def test_golden_values() -> None:
    assert permutation(0, "epoch", 0, 8).tolist() == [3, 2, 0, 6, 4, 7, 5, 1]
    order = Order(seed=20240917, buckets=((Group(5),), (Group(6), Group(4, Fraction(3, 4)))), batch_size=4)
    assert [order.batch(index) for index in range(7)] == [
        (0, (1, 0, 4, 2)),
        (1, (9, 5, 3, 7)),
        (1, (2, 6, 4, 0)),
        (1, (1, 4, 7, 0)),
        (0, (3, 2, 3, 4)),
        (1, (5, 8, 1, 9)),
        (1, (0, 7, 4, 3)),
    ]
    assert order.batch(123_456_789) == (0, (0, 3, 4, 2))
    assert lap(20240917, 0, (Group(3, Fraction(5, 2)), Group(4)), 7).tolist() == [2, 3, 1, 0, 4, 1, 5, 2, 0, 0, 2, 6]
