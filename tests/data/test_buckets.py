import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.buckets import BucketPlan, assign, candidates, fit_loss, plan, report, report_text
from aquatint.errors import UsageError

WEIGHTS = {"area_weight": 0.5, "upscale_weight": 1.0}
SHAPES = candidates(resolution=1024, step=32, min_side=512, max_side=2048, max_aspect=4.0)
SHAPES_64 = candidates(resolution=1024, step=64, min_side=512, max_side=2048, max_aspect=4.0)
side = st.integers(8, 20_000)
size = st.tuples(side, side)


def bucket_of(size_hw, shapes=SHAPES, **weights):
    return tuple(shapes[assign(np.array([size_hw]), shapes, **{**WEIGHTS, **weights})[0]].tolist())


def ones(sizes):
    return np.ones(len(sizes), dtype=np.int64)


def test_candidates_keep_every_rule():
    height, width = SHAPES.T
    assert (SHAPES % 32 == 0).all()
    assert (height * width <= 1024**2).all()
    assert (height * width >= 0.85 * 1024**2).all()
    assert SHAPES.min() >= 512
    assert SHAPES.max() <= 2048
    assert (SHAPES.max(axis=1) <= 4 * SHAPES.min(axis=1)).all()


def test_candidates_are_all_there_are_sorted_and_symmetric():
    expected = [
        (height, width)
        for height in range(512, 2049, 32)
        for width in range(512, 2049, 32)
        if 0.85 * 1024**2 <= height * width <= 1024**2 and max(height, width) <= 4 * min(height, width)
    ]
    assert SHAPES.tolist() == [list(shape) for shape in expected]
    assert {tuple(shape) for shape in SHAPES.tolist()} == {tuple(shape) for shape in SHAPES[:, ::-1].tolist()}


def test_settings_that_leave_no_bucket_are_refused_with_a_way_out():
    with pytest.raises(UsageError, match="no bucket has sides of 1056 to 1056 pixels") as caught:
        candidates(resolution=1024, step=32, min_side=1056, max_side=1056, max_aspect=4.0)
    assert "buckets.min_side" in caught.value.hint


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((3000, 3072), (1024, 1024)),  # nearly square and large: not a smaller square
        ((1000, 1500), (832, 1248)),
        ((1500, 1000), (1248, 832)),
        ((1024, 1024), (1024, 1024)),
        ((832, 1216), (832, 1216)),
        ((64, 64), (1024, 1024)),
        ((10_000, 8), (2048, 512)),
    ],
)
def test_known_sizes_go_to_the_known_buckets(size_hw, expected):
    assert bucket_of(size_hw) == expected


def test_known_buckets_of_the_coarser_grid():
    assert bucket_of((1000, 1500), SHAPES_64) == (832, 1216)


def test_a_fitting_bucket_crops_nothing_and_a_tight_one_what_it_must():
    cropped, scale = fit_loss(np.array([[1000, 1500], [1000, 1500], [500, 500]]), np.array([[832, 1248], [832, 1216], [1024, 1024]]))
    np.testing.assert_allclose(cropped, [0, 1 - 1216 / 1248, 0], atol=1e-12)
    np.testing.assert_allclose(scale, [0.832, 0.832, 2.048])


def test_mean_crop_and_area_are_those_of_the_method():
    """20,000 pictures, log-uniform in aspect from 0.4 to 2.5: 1.02 % cropped, 97.6 % of the area used, 61 buckets."""
    aspect = np.exp(np.random.default_rng(0).uniform(np.log(0.4), np.log(2.5), 20_000))
    sizes = np.stack([3000 * np.sqrt(aspect), 3000 / np.sqrt(aspect)], axis=1).round().astype(np.int64)
    chosen = SHAPES[assign(sizes, SHAPES, **WEIGHTS)]
    assert fit_loss(sizes, chosen)[0].mean() == pytest.approx(0.0102, abs=2e-4)
    assert (chosen.prod(axis=1) / 1024**2).mean() == pytest.approx(0.976, abs=1e-3)
    assert len(np.unique(chosen, axis=0)) == 61


def cost(size_hw, shape, area_weight, upscale_weight):
    """The formula, one pair at a time."""
    (height, width), (bucket_height, bucket_width) = size_hw, shape
    scale = max(bucket_height / height, bucket_width / width)
    crop = abs(np.log((bucket_width / bucket_height) / (width / height)))
    return crop + area_weight * np.log(1024**2 / (bucket_height * bucket_width)) + upscale_weight * max(0.0, np.log(scale))


@settings(max_examples=100, deadline=None)
@given(size_hw=size, area_weight=st.floats(0, 2), upscale_weight=st.floats(0, 2))
def test_no_other_bucket_is_cheaper(size_hw, area_weight, upscale_weight):
    chosen = bucket_of(size_hw, area_weight=area_weight, upscale_weight=upscale_weight)
    best = min(cost(size_hw, shape, area_weight, upscale_weight) for shape in SHAPES.tolist())
    assert cost(size_hw, chosen, area_weight, upscale_weight) == pytest.approx(best, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(size_hw=size)
def test_a_picture_on_its_side_goes_to_the_bucket_on_its_side(size_hw):
    for shapes in (SHAPES, SHAPES_64):
        assert bucket_of(size_hw, shapes) == bucket_of(size_hw[::-1], shapes)[::-1]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(size, min_size=1, max_size=20), seed=st.integers(0, 100))
def test_a_pictures_bucket_depends_on_nothing_but_its_size_and_the_shapes(sizes, seed):
    rng = np.random.default_rng(seed)
    shuffled = SHAPES[rng.permutation(len(SHAPES))]
    together = SHAPES[assign(np.array(sizes), SHAPES, **WEIGHTS)]
    assert (shuffled[assign(np.array(sizes), shuffled, **WEIGHTS)] == together).all()
    assert [bucket_of(one) for one in sizes] == [tuple(shape) for shape in together.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.lists(st.tuples(side, side, st.integers(1, 5)), min_size=1, max_size=60),
    min_count=st.integers(1, 20),
)
def test_a_plan_keeps_every_picture_and_fills_every_bucket(pictures, min_count):
    table = np.array(pictures)
    sizes, repeats = table[:, :2], table[:, 2]
    result = plan(sizes, repeats, SHAPES, min_count=min_count, **WEIGHTS)
    counts = np.bincount(result.assignment, weights=repeats, minlength=len(result.shapes))
    assert len(result.assignment) == len(pictures)
    assert counts.sum() == repeats.sum()
    assert counts.min() > 0
    assert len(counts) == 1 or counts.min() >= min_count
    assert result.shapes.tolist() == sorted(result.shapes.tolist())
    if counts.min() >= min_count and min_count == 1:
        assert (result.shapes[result.assignment] == SHAPES[assign(sizes, SHAPES, **WEIGHTS)]).all()


def test_too_small_buckets_go_to_their_pictures_next_best_ones_in_use():
    sizes = np.array([[1024, 1024]] * 8 + [[832, 1216]] * 8 + [[1216, 832]] * 8 + [[832, 1248], [1088, 960]])
    result = plan(sizes, ones(sizes), SHAPES, min_count=8, **WEIGHTS)
    assert result.shapes.tolist() == [[832, 1216], [1024, 1024], [1216, 832]]
    assert result.assignment[24:].tolist() == [0, 1]
    assert (result.assignment[:24] == np.repeat([1, 0, 2], 8)).all()


def test_repeats_count_as_samples_when_buckets_are_filled():
    sizes = np.array([[1024, 1024]] * 8 + [[832, 1216]] * 2)
    assert len(plan(sizes, np.repeat([1, 4], [8, 2]), SHAPES, min_count=8, **WEIGHTS).shapes) == 2
    assert len(plan(sizes, ones(sizes), SHAPES, min_count=8, **WEIGHTS).shapes) == 1


def test_a_set_smaller_than_a_batch_stays_in_one_bucket():
    sizes = np.array([[1024, 1024], [832, 1216], [1216, 832]])
    result = plan(sizes, ones(sizes), SHAPES, min_count=100, **WEIGHTS)
    assert len(result.shapes) == 1
    assert result.assignment.tolist() == [0, 0, 0]


def test_a_million_pictures_are_planned_in_seconds():
    sizes = np.random.default_rng(0).integers(600, 6000, (1_000_000, 2))
    start = time.perf_counter()
    result = plan(sizes, ones(sizes), SHAPES, min_count=64, **WEIGHTS)
    assert time.perf_counter() - start < 30
    assert len(result.assignment) == 1_000_000


def test_the_report_says_what_every_bucket_holds_and_loses():
    sizes = np.array([[1000, 1500], [416, 624], [2000, 3000], [3000, 3072], [512, 512]])
    result = BucketPlan(np.array([[832, 1216], [1024, 1024]]), np.array([0, 0, 0, 1, 1]))
    wide, square = report(result, sizes, np.array([1, 2, 3, 4, 5]))
    assert (wide.height_px, wide.width_px, wide.num_pictures, wide.num_samples) == (832, 1216, 3, 6)
    assert wide.mean_cropped == pytest.approx(1 - 1216 / 1248)
    assert (wide.num_enlarged, wide.max_enlarged) == (1, 2.0)
    assert (square.num_pictures, square.num_samples, square.num_enlarged, square.max_enlarged) == (2, 9, 1, 2.0)
    assert square.max_cropped == pytest.approx(1 - 3000 / 3072)
    text = report_text((wide, square))
    assert "1216 x 832" in text
    assert "2.6%" in text
    assert "5 pictures in 2 buckets; 2.0% of their area is cropped, 2 are smaller than their bucket and get enlarged" in text
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1
