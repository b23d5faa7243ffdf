import numpy as np
import pytest

from aquatint.data.image import resize
from aquatint.data.inspection import BLURRED_BELOW, FLAT_BELOW, SAME_WITHIN, contrast, fingerprint, near_duplicates, sharpness


def scene(seed, size_hw=(480, 640)):
    """Soft hills of light, edges and grain: no two seeds alike."""
    random = np.random.default_rng(seed)
    coarse = resize(random.integers(0, 256, (6, 8, 3), dtype=np.uint8), size_hw).astype(np.float64)
    for _ in range(12):
        top, left = random.integers(0, size_hw[0] - 60), random.integers(0, size_hw[1] - 60)
        coarse[top : top + random.integers(20, 200), left : left + random.integers(20, 200)] = random.integers(0, 256, 3)
    return np.clip(coarse + random.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


def blurred(pixels, factor=12):
    height, width = pixels.shape[:2]
    return resize(resize(pixels, (height // factor, width // factor)), (height, width))


def bits(left, right):
    return (left ^ right).bit_count()


@pytest.mark.parametrize("seed", range(6))
def test_a_blurred_copy_is_told_from_the_sharp_one(seed):
    assert sharpness(blurred(scene(seed))) < BLURRED_BELOW < sharpness(scene(seed))


def test_sharpness_does_not_depend_much_on_the_size_of_the_file():
    large = scene(1, (1500, 2000))
    assert sharpness(large) == pytest.approx(sharpness(resize(large, (750, 1000))), rel=0.25)


def test_a_picture_of_one_colour_has_no_contrast():
    assert contrast(np.full((100, 200, 3), 77, np.uint8)) == 0.0 < FLAT_BELOW < contrast(scene(2))


@pytest.mark.parametrize("seed", range(6))
def test_copies_that_were_resized_brightened_or_trimmed_look_alike(seed):
    original = scene(seed)
    copies = [
        resize(original, (240, 320)),
        np.clip(original.astype(np.int16) + 12, 0, 255).astype(np.uint8),
        original[4:-4, 4:-4],
    ]
    assert max(bits(fingerprint(original), fingerprint(copy)) for copy in copies) <= SAME_WITHIN


def test_other_pictures_do_not_look_alike():
    prints = [fingerprint(scene(seed)) for seed in range(40)]
    assert near_duplicates(prints) == []


def test_every_pair_within_the_distance_is_found_and_no_other():
    random = np.random.default_rng(5)
    prints = [int(value) for value in random.integers(0, 2**63, 300, dtype=np.uint64)]
    for row in range(0, 300, 3):  # a third of them gets a neighbour, some just near enough and some just not
        flips = random.choice(64, size=int(random.integers(4, 10)), replace=False)
        prints.append(prints[row] ^ sum(1 << int(bit) for bit in flips))
    expected = set()
    for left in range(len(prints)):
        for right in range(left):
            if bits(prints[left], prints[right]) <= SAME_WITHIN:
                expected.add((right, left))
    found = near_duplicates(prints)
    assert {pair for pair in found if len(pair) == 2} == expected
    assert 10 < len(expected) < 90


def test_copies_of_copies_are_one_group():
    assert near_duplicates([0, 0b111111, 0b111111_111111, 1 << 63 | 0xFFFF << 30, 0]) == [(0, 1, 2, 4)]


def test_a_distance_that_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="within 7"):
        near_duplicates([1, 2], 8)


def test_a_hundred_thousand_pictures_of_one_colour_are_no_trouble():
    assert near_duplicates([0] * 100_000) == [tuple(range(100_000))]
