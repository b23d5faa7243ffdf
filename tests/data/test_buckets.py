import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.bucket_sets import assign, bucket_sets, candidates
from aquatint.data.buckets import BucketRow, fit_loss, merged, merged_text, plan, report, report_text, small_buckets

SETTINGS = {"resolution": 1024, "step": 32, "min_side": 512, "max_side": 2048, "max_aspect": 4.0, "area_weight": 0.5}
SETS = bucket_sets("aquatint", **SETTINGS)
TIERED = bucket_sets("aquatint", **{**SETTINGS, "tiers": (768, 512)})
side = st.integers(8, 20_000)


def planned(sizes, repeats=None, sets=SETS, **limits):
    sizes = np.array(sizes)
    return plan(sizes, np.ones(len(sizes)) if repeats is None else np.array(repeats), sets, **{"min_count": 8, **limits})


def buckets_of(result):
    return [tuple(result.shapes[bucket].tolist()) if bucket >= 0 else None for bucket in result.assignment]


# What is lost


def test_a_fitting_bucket_crops_nothing_and_a_tight_one_what_it_must():
    cropped, scale = fit_loss(np.array([[1000, 1500], [1000, 1500], [500, 500]]), np.array([[832, 1248], [832, 1216], [1024, 1024]]))
    np.testing.assert_allclose(cropped, [0, 1 - 1216 / 1248, 0], atol=1e-12)
    np.testing.assert_allclose(scale, [0.832, 0.832, 2.048])


def test_mean_crop_and_area_are_those_of_the_method():
    """20,000 pictures, log-uniform in aspect from 0.4 to 2.5: 1.02 % cropped, 97.6 % of the area used, 61 buckets."""
    aspect = np.exp(np.random.default_rng(0).uniform(np.log(0.4), np.log(2.5), 20_000))
    sizes = np.stack([3000 * np.sqrt(aspect), 3000 / np.sqrt(aspect)], axis=1).round().astype(np.int64)
    result = planned(sizes, min_count=1)
    chosen = result.shapes[result.assignment]
    assert fit_loss(sizes, chosen)[0].mean() == pytest.approx(0.0102, abs=2e-4)
    assert (chosen.prod(axis=1) / 1024**2).mean() == pytest.approx(0.976, abs=1e-3)
    assert len(result.shapes) == 61


# One tier


@settings(max_examples=100, deadline=None)
@given(
    pictures=st.lists(st.tuples(side, side, st.sampled_from([0.25, 1 / 3, 1, 1, 2, 5])), min_size=1, max_size=60),
    min_count=st.integers(1, 20),
    name=st.sampled_from(["aquatint", "kohya", "novelai", "sdxl_table"]),
)
def test_a_plan_keeps_every_picture_and_fills_every_bucket(pictures, min_count, name):
    sizes, repeats = np.array([picture[:2] for picture in pictures]), np.array([picture[2] for picture in pictures])
    (bucket_set,) = bucket_sets(name, **SETTINGS)
    result = plan(sizes, repeats, [bucket_set], min_count=min_count)
    counts = np.bincount(result.assignment, weights=repeats, minlength=len(result.shapes))
    assert result.shapes.dtype == np.int64
    assert result.assignment.dtype == np.int32
    assert result.assignment.shape == (len(pictures),)
    assert result.skipped == {}
    assert counts.min() > 0
    assert len(counts) == 1 or counts.min() >= min_count - 1e-6
    assert (result.place(sizes) == result.assignment).all()
    alone = plan(sizes, repeats, [bucket_set], min_count=0.25)
    assert (alone.shapes[alone.assignment] == bucket_set.shapes[assign(sizes, bucket_set)]).all()


@settings(max_examples=100, deadline=None)
@given(pictures=st.lists(st.tuples(side, side), min_size=1, max_size=40), min_count=st.integers(1, 10))
def test_every_picture_is_in_the_best_of_the_buckets_in_use(pictures, min_count):
    result = planned(pictures, min_count=min_count)
    for (height, width), bucket in zip(pictures, result.assignment, strict=True):
        price = np.abs(np.log(result.shapes[:, 1] / result.shapes[:, 0]) - np.log(width / height))
        price += 0.5 * np.log(1024**2 / result.shapes.prod(axis=1))
        assert price[bucket] == pytest.approx(price.min(), abs=1e-9)


def test_too_small_buckets_go_to_their_pictures_next_best_ones_in_use():
    sizes = np.array([[1024, 1024]] * 8 + [[832, 1216]] * 8 + [[1216, 832]] * 8 + [[832, 1248], [1088, 960]])
    result = planned(sizes)
    assert result.shapes.tolist() == [[1216, 832], [1024, 1024], [832, 1216]]
    assert result.assignment[24:].tolist() == [2, 1]
    assert (result.assignment[:24] == np.repeat([1, 2, 0], 8)).all()


def test_repeats_count_as_samples_when_buckets_are_filled():
    sizes = np.array([[1024, 1024]] * 8 + [[832, 1216]] * 2)
    assert len(planned(sizes, np.repeat([1, 4], [8, 2])).shapes) == 2
    assert len(planned(sizes).shapes) == 1


def test_fractional_repeats_add_up_in_spite_of_rounding():
    sizes = np.array([[1024, 1024]] * 24 + [[832, 1216]] * 24)
    assert len(planned(sizes, [float(Fraction(1, 3))] * 48).shapes) == 2
    assert len(planned(sizes, np.full(48, 0.7, dtype=np.float32), min_count=16.8).shapes) == 2
    assert len(planned(sizes, [0.33] * 48).shapes) == 1


def test_a_set_smaller_than_a_batch_stays_in_one_bucket():
    result = planned([[1024, 1024], [832, 1216], [1216, 832]], min_count=100)
    assert result.shapes.tolist() == [[1024, 1024]]
    assert result.assignment.tolist() == [0, 0, 0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_the_pictures_decides_nothing(seed):
    rng = np.random.default_rng(seed)
    sizes, repeats = rng.integers(200, 3000, (80, 2)), rng.choice([0.5, 1, 3], 80)
    order = rng.permutation(80)
    one, other = (planned(s, r, TIERED, max_upscale=1.5) for s, r in ((sizes, repeats), (sizes[order], repeats[order])))
    assert one.shapes.tolist() == other.shapes.tolist()
    assert (one.assignment[order] == other.assignment).all()


def test_a_million_pictures_are_planned_in_a_second_or_two():
    sizes = np.random.default_rng(0).integers(600, 6000, (1_000_000, 2), dtype=np.int32)
    start = time.process_time()
    result = plan(sizes, np.ones(1_000_000, np.float32), SETS, min_count=20_000, max_upscale=4.0)
    assert time.process_time() - start < 10
    assert np.bincount(result.assignment).min() >= 20_000


# Tiers and pictures that are too small


def test_a_picture_goes_to_the_largest_tier_that_does_not_enlarge_it_too_much():
    sizes = [(2000, 2000), (1024, 1024), (1000, 1000), (700, 700), (600, 600), (500, 500), (420, 420)]
    result = planned(sizes, sets=TIERED, min_count=1, max_upscale=1.25)
    assert result.tier_of[result.assignment].tolist() == [1024, 1024, 1024, 768, 512, 512, 512]
    assert buckets_of(result) == [(1024, 1024)] * 3 + [(768, 768)] + [(512, 512)] * 3


def test_pictures_too_small_for_every_tier_are_skipped_with_the_reason():
    sizes = [(1024, 1024)] * 3 + [(300, 200)]
    result = planned(sizes, min_count=1, max_upscale=2.0)
    assert buckets_of(result) == [(1024, 1024)] * 3 + [None]
    assert result.skipped == {3: "is too small: 200 x 300 would be enlarged 4.2 times, and buckets.max_upscale is 2.0"}
    result = planned(sizes, sets=TIERED, min_count=1, max_upscale=2.0)
    assert result.skipped == {3: "is too small: 200 x 300 would be enlarged 2.1 times, and buckets.max_upscale is 2.0"}
    assert result.place(np.array([(300, 200), (1024, 1024)])).tolist() == [0, 0]


def test_the_reason_never_says_that_two_is_more_than_two():
    result = planned([(1024, 1024), (511, 511)], min_count=1, max_upscale=2.0)
    assert "enlarged 2.004 times, and buckets.max_upscale is 2.0" in result.skipped[1]


def test_nothing_but_too_small_pictures_leaves_no_bucket():
    result = planned([(100, 100), (50, 60)], sets=TIERED, max_upscale=2.0)
    assert result.shapes.shape == (0, 2)
    assert result.assignment.tolist() == [-1, -1]
    assert sorted(result.skipped) == [0, 1]
    assert result.place(np.array([(1024, 1024)])).tolist() == [-1]
    assert report(result, np.array([(100, 100), (50, 60)]), np.ones(2)) == ()


def test_buckets_are_filled_tier_by_tier():
    sizes = [(1024, 1024)] * 8 + [(832, 1216)] * 3 + [(512, 512)] * 8 + [(416, 608)] * 8
    result = planned(sizes, sets=TIERED, max_upscale=1.2)
    assert result.shapes.tolist() == [[1024, 1024], [512, 512], [416, 608]]
    assert result.tier_of.tolist() == [1024, 512, 512]
    assert result.assignment.tolist() == [0] * 11 + [1] * 8 + [2] * 8


def test_a_tier_with_too_few_pictures_gives_them_to_the_next_smaller_one():
    sizes = [(1024, 1024)] * 3 + [(768, 768)] * 20
    result = planned(sizes, sets=TIERED, max_upscale=1.2)
    assert result.shapes.tolist() == [[768, 768]]
    assert (result.assignment == 0).all()


def test_the_smallest_tier_gives_them_to_the_next_larger_one():
    sizes = [(1024, 1024)] * 20 + [(512, 512)] * 3
    result = planned(sizes, sets=TIERED, max_upscale=1.2)
    assert result.shapes.tolist() == [[1024, 1024]]
    assert result.skipped == {}
    (one,) = merged(result, np.array(sizes))
    assert (one.tier_px, one.enlarged_before, one.enlarged_after) == (512, 1.0, 2.0)


def test_weak_tiers_are_closed_one_by_one_until_the_rest_is_filled():
    sizes = [(1024, 1024)] * 5 + [(768, 768)] * 4 + [(512, 512)] * 6
    assert planned(sizes, sets=TIERED, max_upscale=1.2).tier_of.tolist() == [512]  # 4 of 768 to 512, and then 5 of 1024
    assert planned(sizes, sets=TIERED, max_upscale=1.2, min_count=5).tier_of.tolist() == [1024, 512]
    assert planned(sizes, sets=TIERED, max_upscale=1.2, min_count=4).tier_of.tolist() == [1024, 768, 512]


def test_a_dear_enlargement_makes_pictures_prefer_the_tier_that_they_fill():
    sizes = [(800, 800)] * 8
    usual = planned(sizes, sets=TIERED, max_upscale=4.0)
    dear = planned(sizes, sets=TIERED, max_upscale=4.0, upscale_weight=3.0)
    assert (usual.shapes.tolist(), dear.shapes.tolist()) == ([[1024, 1024]], [[768, 768]])


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.lists(st.tuples(side, side), min_size=1, max_size=50),
    min_count=st.integers(1, 12),
    max_upscale=st.sampled_from([1.0, 1.5, 4.0, np.inf]),
)
def test_every_picture_is_in_a_full_bucket_or_skipped_for_its_size(pictures, min_count, max_upscale):
    sizes = np.array(pictures)
    result = planned(sizes, sets=TIERED, min_count=min_count, max_upscale=max_upscale)
    inside = result.assignment >= 0
    assert np.flatnonzero(~inside).tolist() == sorted(result.skipped)
    counts = np.bincount(result.assignment[inside], minlength=len(result.shapes))
    assert counts.sum() == 0 or (counts > 0).all()
    for tier in np.unique(result.tier_of):
        here = counts[result.tier_of == tier]
        assert len(here) == 1 or here.min() >= min_count
    assert len(np.unique(result.tier_of)) <= 1 or all(counts[result.tier_of == tier].sum() >= min_count for tier in result.tier_of)
    assert (result.place(sizes)[inside] == result.assignment[inside]).all()
    assert not inside.any() or result.place(sizes).min() >= 0
    for row in result.skipped:
        fits = [fit_loss(sizes[[row]], one.shapes[assign(sizes[[row]], one)])[1][0] for one in TIERED]
        assert min(fits) > max_upscale


# Reports


def test_the_report_says_what_every_bucket_holds_and_loses():
    sizes = np.array([[1000, 1500], [416, 624], [2000, 3000], [3000, 3072], [512, 512]])
    sets = (SETS[0].only(np.flatnonzero([shape in ([832, 1216], [1024, 1024]) for shape in SETS[0].shapes.tolist()])),)
    repeats = np.array([1, 2, 3, 4, 5.5])
    square, wide = report(plan(sizes, repeats, sets, min_count=1), sizes, repeats)
    assert (wide.height_px, wide.width_px, wide.tier_px, wide.num_pictures, wide.num_samples) == (832, 1216, 1024, 3, 6)
    assert wide.mean_cropped == pytest.approx(1 - 1216 / 1248)
    assert (wide.num_enlarged, wide.max_enlarged) == (1, 2.0)
    assert (square.num_pictures, square.num_samples, square.num_enlarged, square.max_enlarged) == (2, 9.5, 1, 2.0)
    assert square.max_cropped == pytest.approx(1 - 3000 / 3072)
    text = report_text((wide, square))
    assert "1216 x 832" in text
    assert "2.6%" in text
    assert " 9.5 " in text
    assert "tier" not in text
    assert "5 pictures in 2 buckets; 2.0% of their area is cropped, 2 are smaller than their bucket and get enlarged" in text
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1


def row(**changes):
    usual = {"height_px": 832, "width_px": 1216, "tier_px": 1024, "num_pictures": 100, "num_samples": 100.0}
    losses = {"mean_cropped": 0.01, "max_cropped": 0.02, "num_enlarged": 0, "max_enlarged": 1.0}
    return BucketRow(**{**usual, **losses, **changes})


def test_the_report_has_a_column_for_tiers_if_there_are_several():
    text = report_text([row(), row(tier_px=768, num_pictures=12_345_678, num_samples=12_345_678.0)])
    assert " tier " in text.splitlines()[0]
    assert "  768   12345678   12345678  " in text
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1


def test_small_buckets_are_listed_with_the_names_in_them():
    rows = [row(num_pictures=2), row(height_px=1024, width_px=1024, num_pictures=3), row(num_pictures=9)]
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    text = small_buckets(rows, np.array([0, 2, 5, 14]), names, limit=3)
    assert text.splitlines()[1:] == ["  1216 x 832: a.png, b.png", "  1024 x 1024: c.png, d.png, e.png"]
    assert small_buckets(rows, np.array([0, 2, 5, 14]), names, limit=1) == ""


def test_what_was_merged_away_is_told_with_its_pictures_and_what_it_costs_them():
    sizes = np.array([[1024, 1024]] * 12 + [[832, 1248]] * 2 + [[832, 1216]] * 8 + [[1088, 960]])
    result = planned(sizes)
    first, second = merged(result, sizes)
    assert (first.height_px, first.width_px, first.rows.tolist()) == (832, 1248, [12, 13])
    assert (first.cropped_before, first.cropped_after) == (0, pytest.approx(1 - 1216 / 1248))
    assert (second.height_px, second.width_px, second.rows.tolist()) == (1088, 960, [22])
    text = merged_text((first, second), [f"{number}.png" for number in range(len(sizes))], limit=1)
    assert text.splitlines() == [
        "3 pictures are not in their best shape, because too few would share it:",
        "  1248 x 832: 0.0% -> 2.6% cropped: 12.png and 1 more",
        "  960 x 1088: 0.0% -> 11.8% cropped, enlarged up to 1.07x: 22.png",
    ]
    assert merged(planned(sizes, min_count=1), sizes) == ()
    assert merged_text((), []) == ""


def test_what_was_merged_away_are_the_pictures_outside_of_their_best_shape():
    sizes = np.random.default_rng(0).integers(300, 3000, (400, 2))
    result = planned(sizes, sets=TIERED, max_upscale=1.5, min_count=20)
    alone = planned(sizes, sets=TIERED, max_upscale=1.5, min_count=1)
    elsewhere = np.flatnonzero(
        (alone.shapes[alone.assignment] != result.shapes[result.assignment]).any(axis=1)
        | (alone.tier_of[alone.assignment] != result.tier_of[result.assignment])
    )
    elsewhere = elsewhere[alone.assignment[elsewhere] >= 0]
    assert sorted(np.concatenate([one.rows for one in merged(result, sizes)]).tolist()) == elsewhere.tolist()


def test_the_candidates_are_still_found_here():
    from aquatint.data import buckets

    assert buckets.candidates is candidates
