"""Crops are exact integers, one picture at a time or a million; pixels and masks are cut alike."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.buckets import candidates
from aquatint.data.crop import (
    CROP_COLUMNS,
    Crop,
    apply,
    apply_mask,
    fit,
    fit_all,
    position_for_focus,
    positions_for_focus,
    random_positions,
    reductions_of,
    time_ids_of,
)
from aquatint.data.image import Decoded, resize
from tests import zoo

SHAPES = [tuple(shape) for shape in candidates(resolution=1024, step=32, min_side=512, max_side=2048, max_aspect=4.0).tolist()]
side = st.integers(8, 20_000)
size = st.tuples(side, side)
share = st.floats(0, 1)
shape = st.sampled_from(SHAPES)


def test_methods_7_the_known_wide_picture():
    """3000 x 2000 into 1216 x 832: resized to 1248 x 832, 16 pixels cut off at the left and at the right."""
    crop = fit((2000, 3000), (832, 1216))
    assert crop.resized_hw == (832, 1248)
    assert (crop.top, crop.left) == (0, 16)
    assert crop.time_ids == (2000, 3000, 0, 16, 832, 1216)
    assert fit((2000, 3000), (832, 1216), flipped=True).time_ids == (2000, 3000, 0, 16, 832, 1216)


def test_a_mirrored_picture_says_where_its_crop_is_in_the_mirror():
    crop = fit((2000, 3000), (832, 1216), position=(0.0, 0.0), flipped=True)
    assert crop.left == 0
    assert crop.time_ids == (2000, 3000, 0, 32, 832, 1216)


def test_size_conditioning_is_height_before_width():
    assert fit((3000, 2000), (1216, 832)).time_ids == (3000, 2000, 16, 0, 1216, 832)


def test_a_picture_of_the_buckets_size_is_not_touched():
    image = np.asarray(zoo.textured((64, 96)))
    crop = fit((64, 96), (64, 96))
    assert crop.time_ids == (64, 96, 0, 0, 64, 96)
    assert (apply(Decoded.of(image), crop) == image).all()


@settings(max_examples=200, deadline=None)
@given(size_hw=size, target_hw=shape, position=st.tuples(share, share), flipped=st.booleans())
def test_a_fit_covers_its_target_as_tightly_as_whole_pixels_allow(size_hw, target_hw, position, flipped):
    crop = fit(size_hw, target_hw, position=position, flipped=flipped)
    excess = [crop.resized_hw[axis] - target_hw[axis] for axis in (0, 1)]
    assert min(excess) == 0
    scale = max(target_hw[axis] / size_hw[axis] for axis in (0, 1))
    for axis, offset in enumerate((crop.top, crop.left)):
        assert 0 <= offset <= excess[axis]
        assert abs(crop.resized_hw[axis] - size_hw[axis] * scale) <= 0.5 + 1e-6
    assert crop.scale == pytest.approx(scale, rel=0.51 / min(crop.resized_hw))
    assert all(isinstance(value, int) and value >= 0 for value in crop.time_ids)


@settings(max_examples=100, deadline=None)
@given(size_hw=size, target_hw=shape, position=st.tuples(share, share))
def test_what_is_cut_off_at_the_left_of_the_mirror_image_was_at_the_right(size_hw, target_hw, position):
    plain, mirrored = (fit(size_hw, target_hw, position=position, flipped=flipped) for flipped in (False, True))
    assert plain.time_ids[3] + target_hw[1] + mirrored.time_ids[3] == plain.resized_hw[1]
    assert plain.time_ids[:3] + plain.time_ids[4:] == mirrored.time_ids[:3] + mirrored.time_ids[4:]
    assert (plain.top, plain.left) == (mirrored.top, mirrored.left)


@settings(max_examples=100, deadline=None)
@given(size_hw=size, target_hw=shape)
def test_a_centred_cut_leaves_the_same_on_both_sides(size_hw, target_hw):
    crop = fit(size_hw, target_hw)
    below = crop.resized_hw[0] - target_hw[0] - crop.top
    right = crop.resized_hw[1] - target_hw[1] - crop.left
    assert abs(crop.top - below) <= 1
    assert abs(crop.left - right) <= 1


@settings(max_examples=25, deadline=None)
@given(
    size_hw=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    target_hw=st.tuples(st.integers(16, 64), st.integers(16, 64)),
    position=st.tuples(share, share),
)
def test_a_crop_is_the_cut_out_of_the_whole_resized_picture(size_hw, target_hw, position):
    image = np.asarray(zoo.textured(size_hw))
    crop = fit(size_hw, target_hw, position=position)
    whole = resize(image, crop.resized_hw)[crop.top : crop.top + target_hw[0], crop.left : crop.left + target_hw[1]]
    kept = apply(Decoded.of(image), crop)
    assert kept.shape == (*target_hw, 3)
    assert np.abs(kept.astype(int) - whole).max() <= 3  # Pillow keeps the box in single precision


def test_a_mirrored_crop_is_the_mirror_image_of_the_plain_one():
    image = Decoded.of(np.asarray(zoo.textured((60, 100))))
    plain, mirrored = (apply(image, fit((60, 100), (32, 32), position=(0.3, 0.1), flipped=flipped)) for flipped in (False, True))
    assert (mirrored == plain[:, ::-1]).all()
    assert not (mirrored == plain).all()


def test_a_very_long_picture_is_cropped_without_resizing_all_of_it():
    crop = fit((8, 20_000), (512, 2048))
    assert crop.resized_hw == (512, 1_280_000)
    assert apply(Decoded.of(np.zeros((8, 20_000, 3), np.uint8)), crop).shape == (512, 2048, 3)


def test_a_crop_for_another_picture_is_refused():
    with pytest.raises(ValueError, match=r"the picture is \(10, 20\), the crop is for \(20, 10\)"):
        apply(Decoded.of(np.zeros((10, 20, 3), np.uint8)), fit((20, 10), (8, 8)))


# Tables


def digests(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


@settings(max_examples=200, deadline=None)
@given(
    pictures=st.lists(st.tuples(size, shape, st.lists(st.tuples(share, share), min_size=2, max_size=2)), min_size=1, max_size=8),
    flip=st.booleans(),
    dtype=st.sampled_from([np.int32, np.int64]),
)
def test_a_table_of_crops_says_what_fit_says(pictures, flip, dtype):
    sizes, targets, positions = zip(*pictures, strict=True)
    crops = fit_all(np.array(sizes, dtype), np.array(targets, dtype), np.array(positions), flip=flip)
    expected = [
        [
            fit(size_hw, target_hw, position=position, flipped=flipped)
            for position in at
            for flipped in ((False, True) if flip else (False,))
        ]
        for size_hw, target_hw, at in pictures
    ]
    assert crops.dtype == np.int32
    assert crops.tolist() == [[list(crop.to_row()) for crop in row] for row in expected]
    assert [[Crop.from_row(row) for row in rows] for rows in crops] == expected
    assert time_ids_of(crops).dtype == np.int32
    assert time_ids_of(crops).tolist() == [[list(crop.time_ids) for crop in row] for row in expected]


def test_columns_are_named_in_the_order_of_a_crops_fields():
    crop = Crop((1, 2), (3, 4), 5, 6, (7, 8), flipped=True)
    assert dict(zip(CROP_COLUMNS, crop.to_row(), strict=True)) == {
        "original_height": 1, "original_width": 2, "resized_height": 3, "resized_width": 4, "top": 5, "left": 6,
        "target_height": 7, "target_width": 8, "flipped": 1,
    }  # fmt: skip
    assert Crop.from_row(np.array(crop.to_row(), np.int32)) == crop
    assert [type(value) for value in dataclasses.astuple(Crop.from_row(np.array(crop.to_row(), np.int32)))] == [
        tuple,
        tuple,
        int,
        int,
        tuple,
        bool,
    ]


@pytest.mark.parametrize(
    ("size_hw", "target_hw", "reduction"),
    [
        ((3000, 4000), (896, 1152), 2),
        ((4000, 6000), (832, 1216), 2),  # a quarter would leave 1.2 times as much as is needed
        ((6000, 8000), (896, 1152), 4),
        ((9600, 9600), (896, 896), 8),
        ((2000, 3000), (832, 1216), 1),
        ((2048, 2048), (768, 768), 2),
        ((2047, 2048), (768, 768), 1),
    ],
)
def test_a_picture_is_decoded_smaller_only_where_enough_is_left(size_hw, target_hw, reduction):
    crops = np.array([[fit(size_hw, target_hw, flipped=flipped).to_row() for flipped in (False, True)]], np.int32)
    assert reductions_of(crops).tolist() == [[reduction, reduction]]


@settings(max_examples=100, deadline=None)
@given(size_hw=size, target_hw=shape)
def test_what_is_left_is_a_third_larger_than_needed_in_both_directions(size_hw, target_hw):
    crop = fit(size_hw, target_hw)
    reduction = int(reductions_of(np.array(crop.to_row(), np.int32)))
    spare = min(side / resized for side, resized in zip(size_hw, crop.resized_hw, strict=True))
    assert reduction == 1 or spare / reduction >= 4 / 3 - 1e-9
    assert reduction == 8 or spare / (2 * reduction) < 4 / 3 + 1e-9


def test_a_table_of_no_pictures_is_empty():
    assert fit_all(np.zeros((0, 2), int), np.zeros((0, 2), int), np.zeros((0, 3, 2)), flip=True).shape == (0, 6, 9)
    assert random_positions(np.zeros((0, 16), np.uint8), 4).shape == (0, 4, 2)


def test_sides_without_a_number_of_32_bits_are_refused():
    with pytest.raises(ValueError, match=r"a picture of \[8, 90000000\] pixels cannot be resized"):
        fit_all(np.array([[100, 100], [8, 90_000_000]]), np.array([[512, 512], [512, 2048]]), np.full((2, 1, 2), 0.5))


def test_half_a_million_pictures_are_fitted_in_moments():
    sizes = np.random.default_rng(0).integers(300, 6000, (500_000, 2))
    targets = np.array(SHAPES)[np.arange(len(sizes)) % len(SHAPES)]
    start = time.perf_counter()
    crops = fit_all(sizes, targets, random_positions(digests(len(sizes)), 1), flip=True)
    assert time_ids_of(crops).shape == (500_000, 2, 6)
    assert time.perf_counter() - start < 3


# Positions


def splitmix(state, index):
    """Output `index` of SplitMix64, in Python's integers."""
    return mix((state + (index + 1) * 0x9E3779B97F4A7C15) % 2**64)


def mix(word):
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_random_positions_are_those_of_the_published_generator():
    assert [hex(splitmix(0, index)) for index in (0, 1)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
    ]  # its known first outputs for seed 0
    table = digests(5)
    first, second = (np.ascontiguousarray(table).view("<u8").reshape(5, 2)[:, column].tolist() for column in (0, 1))
    expected = [
        [[(mix(splitmix(a, 2 * variant + axis) ^ b) >> 11) / 2**53 for axis in (0, 1)] for variant in range(3)]
        for a, b in zip(first, second, strict=True)
    ]
    assert random_positions(table, 3).tolist() == expected


def test_golden_values():
    table = np.stack([np.arange(16, dtype=np.uint8), np.full(16, 255, np.uint8)])
    assert random_positions(table, 2).tolist() == [
        [[0.27314748318366877, 0.20638916690678055], [0.36986846995041955, 0.38610842585699345]],
        [[0.274669412220821, 0.851044368692896], [0.1014546513591752, 0.8396910453419398]],
    ]
    assert fit_all(np.array([[104, 220], [220, 104]]), np.array([[100, 100]] * 2), random_positions(table, 2)).tolist() == [
        [[104, 220, 100, 212, 0, 23, 100, 100, 0], [104, 220, 100, 212, 0, 43, 100, 100, 0]],
        [[220, 104, 212, 100, 31, 0, 100, 100, 0], [220, 104, 212, 100, 11, 0, 100, 100, 0]],
    ]


def test_random_positions_are_a_function_of_the_content_and_the_variant():
    table = digests(50)
    found = random_positions(table, 3)
    assert (found[7] == random_positions(table[7:8], 3)[0]).all()
    assert (found == random_positions(table, 5)[:, :3]).all()
    assert len(np.unique(found)) == found.size
    for byte in range(16):  # every part of the digest matters
        other = table.copy()
        other[:, byte] ^= 1
        assert (random_positions(other, 3) != found).all()


def test_random_positions_are_spread_evenly():
    found = random_positions(digests(20_000), 2)
    assert ((found >= 0) & (found < 1)).all()
    counts = np.histogram2d(found[..., 0].ravel(), found[..., 1].ravel(), bins=10, range=[[0, 1]] * 2)[0]
    assert ((counts - 400) ** 2 / 400).sum() < 149  # chi-square with 99 degrees of freedom: p = 0.001
    across = np.corrcoef(found.reshape(-1, 4).T)  # two coordinates of two variants
    assert np.abs(across - np.eye(4)).max() < 0.03


def test_every_offset_comes_equally_often():
    crops = fit_all(np.full((3000, 2), (104, 100)), np.full((3000, 2), 100), random_positions(digests(3000), 1))
    counts = np.bincount(crops[:, 0, CROP_COLUMNS.index("top")], minlength=5)
    assert len(counts) == 5
    np.testing.assert_allclose(counts, 600, atol=100)


@settings(max_examples=200, deadline=None)
@given(size_hw=size, target_hw=shape, point=st.tuples(share, share))
def test_no_cut_has_its_centre_nearer_to_the_point(size_hw, target_hw, point):
    crop = fit(size_hw, target_hw, position=position_for_focus(size_hw, target_hw, point))
    for axis, offset in enumerate((crop.top, crop.left)):
        wanted = point[axis] * crop.resized_hw[axis] - target_hw[axis] / 2
        others = {0, offset - 1, offset + 1, crop.resized_hw[axis] - target_hw[axis]}
        allowed = [other for other in others if 0 <= other <= crop.resized_hw[axis] - target_hw[axis]]
        assert all(abs(offset - wanted) <= abs(other - wanted) + 1e-6 for other in allowed)


def test_a_subject_at_the_edge_is_kept_whole():
    crop = fit((1000, 3000), (1000, 1000), position=position_for_focus((1000, 3000), (1000, 1000), (0.5, 0.95)))
    assert (crop.top, crop.left) == (0, 2000)
    crop = fit((1000, 3000), (1000, 1000), position=position_for_focus((1000, 3000), (1000, 1000), (0.5, 0.4)))
    assert crop.left == 700  # its centre at 1200 of 3000


@settings(max_examples=50, deadline=None)
@given(pictures=st.lists(st.tuples(size, shape, st.tuples(share, share)), min_size=1, max_size=8))
def test_a_table_of_points_gives_the_positions_of_each(pictures):
    sizes, targets, points = (np.array(column) for column in zip(*pictures, strict=True))
    assert positions_for_focus(sizes, targets, points).tolist() == [list(position_for_focus(*picture)) for picture in pictures]


# Masks


def ramp(size_hw, axis):
    """Grey that grows by two levels per pixel and then falls by as many: an error of a pixel is one of two levels."""
    count = np.arange(size_hw[axis])
    values = np.abs((2 * count + 255) % 510 - 255).astype(np.uint8)
    return np.broadcast_to(values[:, None] if axis == 0 else values, size_hw).copy()


@pytest.mark.parametrize("axis", [0, 1])
@settings(max_examples=30, deadline=None)
@given(
    size_hw=st.tuples(st.integers(100, 250), st.integers(100, 250)),
    target_hw=st.tuples(st.sampled_from([64, 96, 128]), st.sampled_from([64, 96, 128])),
    position=st.tuples(share, share),
    flipped=st.booleans(),
)
def test_a_mask_lies_on_its_picture_within_half_a_pixel(axis, size_hw, target_hw, position, flipped):
    grey = ramp(size_hw, axis)
    crop = fit(size_hw, target_hw, position=position, flipped=flipped)
    picture = apply(Decoded.of(np.repeat(grey[:, :, None], 3, axis=2)), crop)[:, :, 0].astype(float)
    mask = apply_mask(grey, crop).astype(float)
    assert mask.shape == target_hw
    is_straight = (mask > 12) & (mask < 243)  # away from where the ramp turns, and the two filters differ
    is_straight[:4], is_straight[-4:], is_straight[:, :4], is_straight[:, -4:] = (False,) * 4
    levels_per_px = 2 / crop.scale
    difference = (mask - picture)[is_straight]
    assert np.abs(difference).max(initial=0) <= 0.5 * levels_per_px + 1  # rounding


def test_the_edge_of_a_mask_is_where_the_edge_of_the_picture_is():
    whole = np.zeros((120, 200), np.uint8)
    whole[30:90, 50:150] = 255
    for flipped in (False, True):
        crop = fit((120, 200), (64, 64), position=(0.5, 0.2), flipped=flipped)
        picture, mask = apply(Decoded.of(np.repeat(whole[:, :, None], 3, axis=2)), crop)[:, :, 0], apply_mask(whole, crop)
        assert ((picture > 127) == (mask > 127)).all()
        assert (mask > 127).sum() not in (0, mask.size)


def test_an_area_that_fits_into_whole_pixels_is_their_mean():
    mask = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    means = mask.reshape(16, 4, 24, 4).mean(axis=(1, 3))
    assert (apply_mask(mask, fit((64, 96), (16, 24))) == np.rint(means)).all()
    assert (apply_mask(mask, fit((64, 96), (16, 24), flipped=True)) == np.rint(means)[:, ::-1]).all()
    assert (apply_mask(mask, fit((64, 96), (64, 96))) == mask).all()
    assert (apply_mask(mask, fit((64, 96), (128, 192))) == mask.repeat(2, axis=0).repeat(2, axis=1)).all()


@settings(max_examples=30, deadline=None)
@given(size_hw=st.tuples(st.integers(8, 90), st.integers(8, 90)), target_hw=st.tuples(st.integers(8, 90), st.integers(8, 90)))
def test_a_mask_keeps_its_weight_where_nothing_is_cut_off(size_hw, target_hw):
    mask = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    assert apply_mask(mask, Crop(size_hw, target_hw, 0, 0, target_hw)).mean() == pytest.approx(mask.mean(), abs=0.5)
    full = np.full(size_hw, 255, np.uint8)
    assert (apply_mask(full, fit(size_hw, target_hw)) == 255).all()
    assert not apply_mask(np.zeros_like(full), fit(size_hw, target_hw)).any()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"the picture is \(10, 20\), the crop is for \(20, 10\)"):
        apply_mask(np.zeros((10, 20), np.uint8), fit((20, 10), (8, 8)))
