import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.buckets import candidates
from aquatint.data.crop import apply, fit, views
from aquatint.data.image import resize
from tests import zoo

SHAPES = [tuple(shape) for shape in candidates(resolution=1024, step=32, min_side=512, max_side=2048, max_aspect=4.0).tolist()]
side = st.integers(8, 20_000)
size = st.tuples(side, side)
share = st.floats(0, 1)
shape = st.sampled_from(SHAPES)


def test_the_known_wide_picture():
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
    assert (apply(image, crop) == image).all()


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
    kept = apply(image, crop)
    assert kept.shape == (*target_hw, 3)
    assert np.abs(kept.astype(int) - whole).max() <= 3  # Pillow keeps the box in single precision


def test_a_mirrored_crop_is_the_mirror_image_of_the_plain_one():
    image = np.asarray(zoo.textured((60, 100)))
    plain, mirrored = (apply(image, fit((60, 100), (32, 32), position=(0.3, 0.1), flipped=flipped)) for flipped in (False, True))
    assert (mirrored == plain[:, ::-1]).all()
    assert not (mirrored == plain).all()


def test_a_very_long_picture_is_cropped_without_resizing_all_of_it():
    crop = fit((8, 20_000), (512, 2048))
    assert crop.resized_hw == (512, 1_280_000)
    assert apply(np.zeros((8, 20_000, 3), np.uint8), crop).shape == (512, 2048, 3)


def test_a_crop_for_another_picture_is_refused():
    with pytest.raises(ValueError, match=r"the picture is \(10, 20\), the crop is for \(20, 10\)"):
        apply(np.zeros((10, 20, 3), np.uint8), fit((20, 10), (8, 8)))


def test_centre_views_are_one_or_one_and_its_mirror_image():
    assert views("ab", (2000, 3000), (832, 1216), mode="center", variants=5, flip=False) == (fit((2000, 3000), (832, 1216)),)
    plain, mirrored = views("ab", (2000, 3000), (832, 1216), mode="center", variants=5, flip=True)
    assert (plain.flipped, mirrored.flipped) == (False, True)


def test_random_views_are_indexed_by_variant_and_mirror():
    crops = views("ab", (2000, 3000), (832, 832), mode="random", variants=4, flip=True)
    assert [crop.flipped for crop in crops] == [False, True] * 4
    assert all(crops[2 * index].left == crops[2 * index + 1].left for index in range(4))
    assert len({crop.left for crop in crops}) == 4


def test_random_views_are_a_function_of_the_content():
    arguments = {"mode": "random", "variants": 3, "flip": False}
    first = views("ab", (2000, 3000), (832, 832), **arguments)
    assert first == views("ab", (2000, 3000), (832, 832), **arguments)
    assert first != views("cd", (2000, 3000), (832, 832), **arguments)
    assert first == views("ab", (2000, 3000), (832, 832), **{**arguments, "variants": 5})[:3]


def test_random_views_reach_every_offset_equally_often():
    crops = views("ab", (104, 100), (100, 100), mode="random", variants=3000, flip=False)
    counts = np.bincount([crop.top for crop in crops], minlength=5)
    assert len(counts) == 5
    np.testing.assert_allclose(counts, 600, atol=100)
