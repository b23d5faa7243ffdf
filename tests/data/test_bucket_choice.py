from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.bucket_choice import Tally, choose
from aquatint.data.bucket_sets import BucketSet, aspects_of, assign, bucket_sets

(OURS,) = bucket_sets("aquatint", resolution=1024, step=32, min_side=512, max_side=2048, max_aspect=4.0, area_weight=0.5)
REPEATS = [1 / 3, 0.5, 1.0, 1.0, 2.0, 5.0]


@st.composite
def small_sets(draw):
    """Up to seven shapes, on a coarse grid so that ties of all kinds happen, or anywhere."""
    linear = draw(st.booleans())
    if draw(st.booleans()):
        places, prices = st.integers(-4, 4).map(lambda k: k * 0.25), st.integers(0, 4).map(lambda k: k * 0.125)
    else:
        places, prices = st.floats(-1, 1), st.floats(0, 0.5)
    points = draw(st.lists(st.tuples(places, prices), min_size=1, max_size=7, unique=True))
    positions, costs = np.array(points).T
    if linear:
        positions = positions + 2.0
    ranks = np.array(draw(st.permutations(range(len(points)))))
    order = np.lexsort((ranks, positions))
    shapes = np.array([[index, index] for index in range(len(points))])
    return BucketSet(1024, shapes, positions[order], costs[order], ranks[order], linear)


@st.composite
def instances(draw):
    bucket_set = draw(small_sets())
    lowest, highest = (1.0, 3.0) if bucket_set.linear else (-1.2, 1.2)
    grid = st.integers(0, 16).map(lambda k: lowest + (highest - lowest) * k / 16)
    positions = draw(st.lists(st.one_of(grid, st.floats(lowest, highest)), min_size=1, max_size=14))
    aspects = bucket_set.aspect_at(np.array(positions))
    samples = np.array(draw(st.lists(st.sampled_from(REPEATS), min_size=len(aspects), max_size=len(aspects))))
    return bucket_set, aspects, samples, draw(st.sampled_from([1, 1.5, 2, 3, 4, 7, 100]))


def solved(bucket_set, aspects, samples, min_count):
    return choose(bucket_set, min_count * (1 - 1e-9), lambda: iter([(aspects, samples)]))


def go(bucket_set, subset, aspects):
    """Every picture to the cheapest shape of the subset, of equals to the preferred one, without a thought."""
    table = np.abs(bucket_set.positions[None, subset] - bucket_set.position_of(aspects)[:, None]) + bucket_set.prices[None, subset]
    equal = table <= table.min(axis=1, keepdims=True) + 1e-11
    return np.where(equal, bucket_set.ranks[list(subset)], 99).argmin(axis=1), table.min(axis=1)


def by_brute_force(bucket_set, aspects, samples, min_count):
    """The least cost over all subsets whose shapes are all filled, or that have only one."""
    least = np.inf
    for count in range(1, len(bucket_set) + 1):
        for subset in combinations(range(len(bucket_set)), count):
            chosen, costs = go(bucket_set, subset, aspects)
            filled = np.bincount(chosen, samples, count) >= min_count * (1 - 1e-9)
            if count == 1 or filled.all():
                least = min(least, float(costs @ samples))
    return least


def greedy(bucket_set, aspects, samples, min_count):
    """What was done before: the smallest bucket is dissolved, its pictures go to their next-best ones, until all are filled."""
    used = np.arange(len(bucket_set))
    while True:
        chosen, costs = go(bucket_set, tuple(used), aspects)
        filled = np.bincount(chosen, samples, len(used))
        used, filled = used[filled > 0], filled[filled > 0]
        if len(used) == 1 or filled.min() >= min_count * (1 - 1e-9):
            return float(costs @ samples)
        used = np.delete(used, filled.argmin())


def total_cost(bucket_set, indices, aspects, samples):
    used = bucket_set.only(indices)
    return float(used.cost(aspects, used.cheapest(aspects)) @ samples)


@settings(max_examples=300, deadline=None)
@given(instance=instances())
def test_no_choice_of_shapes_costs_less(instance):
    bucket_set, aspects, samples, min_count = instance
    indices = solved(*instance)
    inside = np.bincount(bucket_set.only(indices).cheapest(aspects), samples, len(indices))
    assert len(indices) == 1 or inside.min() >= min_count * (1 - 1e-9)
    assert total_cost(bucket_set, indices, aspects, samples) == pytest.approx(by_brute_force(*instance), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(instance=instances())
def test_dissolving_the_smallest_bucket_first_is_never_better(instance):
    bucket_set, aspects, samples, _ = instance
    assert total_cost(bucket_set, solved(*instance), aspects, samples) <= greedy(*instance) + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 300), min_count=st.integers(2, 64))
def test_nor_is_it_over_all_our_shapes(seed, count, min_count):
    rng = np.random.default_rng(seed)
    aspects = aspects_of(rng.integers(300, 3000, (count, 2)))
    samples = rng.choice(REPEATS, count)
    cost = total_cost(OURS, solved(OURS, aspects, samples, min_count), aspects, samples)
    assert cost <= greedy(OURS, aspects, samples, min_count) + 1e-9


def test_it_can_be_far_better():
    """A batch of eight, and the shapes of three pictures are dissolved one after the other until everything is square."""
    sizes = np.array([[1024, 1024]] * 9 + [[992, 1056]] * 3 + [[928, 1120]] * 3 + [[832, 1216]] * 7)
    aspects, samples = aspects_of(sizes), np.ones(22)
    indices = solved(OURS, aspects, samples, 8)
    assert OURS.shapes[indices].tolist() == [[1024, 1024], [864, 1184]]
    assert total_cost(OURS, indices, aspects, samples) < 0.34 * greedy(OURS, aspects, samples, 8)


def test_without_a_minimum_every_picture_is_in_its_cheapest_shape():
    sizes = np.random.default_rng(0).integers(300, 3000, (500, 2))
    indices = solved(OURS, aspects_of(sizes), np.ones(500), 1)
    assert (OURS.only(indices).shapes[assign(sizes, OURS.only(indices))] == OURS.shapes[assign(sizes, OURS)]).all()
    assert set(indices) == set(assign(sizes, OURS).tolist())


def test_what_portions_the_pictures_come_in_makes_no_difference():
    rng = np.random.default_rng(1)
    aspects, samples = aspects_of(rng.integers(300, 3000, (1000, 2))), rng.choice(REPEATS, 1000)
    whole = choose(OURS, 40, lambda: iter([(aspects, samples)]))
    parts = choose(OURS, 40, lambda: iter([(aspects[k::7], samples[k::7]) for k in range(7)]))
    assert whole.tolist() == parts.tolist()


def test_a_tally_counts_up_to_and_including_its_edges():
    tally = Tally.of(
        OURS, np.array([0.5, 1.0]), iter([(np.array([1.0, 0.5, 0.4]), np.array([1.0, 2.0, 4.0])), (np.array([3.0]), np.ones(1))])
    )
    assert tally.samples.tolist() == [6, 7, 8]
    np.testing.assert_allclose(tally.sums, [2 * np.log(0.5) + 4 * np.log(0.4)] * 2 + [2 * np.log(0.5) + 4 * np.log(0.4) + np.log(3)])


def test_samples_that_do_not_fill_one_bucket_stay_together_in_the_best_one():
    aspects = aspects_of(np.array([[1024, 1024], [832, 1216], [1216, 832]]))
    (index,) = solved(OURS, aspects, np.ones(3), 100)
    assert OURS.shapes[index].tolist() == [1024, 1024]
