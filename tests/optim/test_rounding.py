import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.optim.rounding import copy_stochastic_, draw_bits, draw_for, draw_rows, round_stochastic, rounding_key

ALL_BITS = torch.arange(65536, dtype=torch.int32)
EVERY_BFLOAT16 = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
CPU = torch.device("cpu")
LARGEST = torch.finfo(torch.bfloat16).max


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_value_one_eighth_of_the_way_up_is_rounded_up_one_time_in_eight():
    rounded = round_stochastic(torch.full((65536,), 1 + 2**-10), ALL_BITS)
    assert rounded.unique().tolist() == [1.0, 1 + 2**-7]
    assert (rounded > 1).float().mean().item() == 0.125


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_the_mean_over_all_random_bits_is_exactly_the_value(value):
    rounded = round_stochastic(torch.full((65536,), value), ALL_BITS)
    assert rounded.dtype == torch.bfloat16
    assert rounded.double().mean().item() == value


@pytest.mark.parametrize("random_bits", [0, 1, 32768, 65535])
def test_what_bfloat16_can_hold_is_never_changed(random_bits):
    value = EVERY_BFLOAT16[EVERY_BFLOAT16.isfinite()]
    assert torch.equal(round_stochastic(value.float(), torch.full(value.shape, random_bits, dtype=torch.int32)), value)


def test_nan_stays_nan_also_the_one_of_a_gpu_that_has_all_bits_set():
    all_bits_set = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    value = torch.cat([torch.tensor([float("nan"), -float("nan")]), all_bits_set])
    assert round_stochastic(value, torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


def test_no_value_becomes_infinite():
    beyond = torch.tensor([torch.finfo(torch.float32).max, float("inf")])
    rounded = round_stochastic(torch.cat([beyond, -beyond]), torch.full((4,), 65535, dtype=torch.int32))
    assert rounded.tolist() == [LARGEST, LARGEST, -LARGEST, -LARGEST]


def test_drawn_rounding_is_unbiased_within_three_standard_errors():
    source = torch.randn(200_000, generator=generator(1))
    for random_bits in draw_bits((1, 2), 0, 200_000, CPU):
        target = torch.empty(200_000, dtype=torch.bfloat16)
        copy_stochastic_(target, source, random_bits)
        error = target.double() - source.double()
        assert abs(error.mean()) < 3 * error.std() / 200_000**0.5
        assert error.abs().max() < 2**-7 * source.abs().max()


def test_a_thousand_small_steps_add_up_where_rounding_to_the_nearest_stands_still():
    stochastic, nearest = torch.ones(2, 10_000, dtype=torch.bfloat16)
    for step in range(1000):
        copy_stochastic_(stochastic, stochastic.float() - 1e-4, draw_for(stochastic, (0, step))[0])
        nearest.copy_(nearest.float() - 1e-4)
    assert (nearest == 1).all()
    assert stochastic.float().mean().item() == pytest.approx(0.9, abs=3 * 0.0195 / 100)
    assert stochastic.float().std().item() == pytest.approx(0.0195, rel=0.05)


def test_a_moment_that_decays_by_0_999_decays():
    moment = torch.ones(10_000, dtype=torch.bfloat16)
    for step in range(1000):
        copy_stochastic_(moment, moment.float() * 0.999, draw_for(moment, (0, step))[0])
    assert torch.tensor(0.999).bfloat16() == 1  # what rounding to the nearest would make of it, for ever
    assert moment.float().mean().item() == pytest.approx(0.999**1000, rel=0.01)


def test_float32_targets_take_the_value_as_it_is_and_need_no_random_bits():
    source, target = torch.randn(100, generator=generator()), torch.empty(100)
    random_bits = draw_for(target, (0, 0))
    copy_stochastic_(target, source, random_bits[0])
    assert random_bits.shape == (3, 0)
    assert torch.equal(target, source)


def test_float16_weights_are_refused():
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        copy_stochastic_(torch.empty(2, dtype=torch.float16), torch.ones(2), torch.zeros(2, dtype=torch.int32))


def test_the_largest_numbers_are_rounded_up_as_often_as_any_other():
    below = torch.tensor([LARGEST]).view(torch.int32) - 16384  # a quarter of a step below the largest
    rounded = round_stochastic(below.view(torch.float32).expand(65536).contiguous(), ALL_BITS)
    assert (rounded == LARGEST).float().mean().item() == 0.75


def pcg3d(x: np.ndarray, y: int, z: int) -> np.ndarray:
    """The generator as it is published, in uint32."""
    v = np.stack([x, np.full_like(x, y), np.full_like(x, z)]) * np.uint32(1664525) + np.uint32(1013904223)
    for folds in (True, False):
        for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            v[a] += v[b] * v[c]
        if folds:
            v ^= v >> np.uint32(16)
    return v


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**31 - 1, 2**32 - 1)])
def test_drawn_bits_are_the_halves_of_pcg3d_with_the_upper_over_the_lower(key):
    words = pcg3d(np.arange(1000, dtype=np.uint32), *key)
    words ^= words >> np.uint32(16)
    expected = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(3, 2000).astype(np.int32)
    assert torch.equal(draw_bits(key, 0, 2000, CPU), torch.from_numpy(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(0, 100))
def test_drawn_bits_are_a_function_of_the_place(start, count):
    assert torch.equal(draw_bits((3, 4), start, count, CPU), draw_bits((3, 4), 0, 200, CPU)[:, start : start + count])


@pytest.mark.parametrize("width", [1, 2, 9, 10, 11])
def test_the_three_numbers_of_a_place_are_for_three_weights_of_a_row_a_third_of_it_apart(width):
    third = math.ceil(width / 3)
    drawn, expected = draw_rows(torch.empty(7, width, dtype=torch.bfloat16), (3, 4)), draw_bits((3, 4), 0, 7 * third, CPU)
    for row, column in itertools.product(range(7), range(width)):
        assert drawn[row, column] == expected[column // third, row * third + column % third]
    assert torch.equal(draw_rows(torch.empty(4, width, dtype=torch.bfloat16), (3, 4), 3), drawn[3:])
    assert len(draw_rows(torch.empty(7, width), (3, 4))) == 0


def test_seed_unit_and_step_each_give_other_bits():
    keys = [rounding_key(*arguments) for arguments in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))]
    rows = torch.cat([draw_bits(key, 0, 1000, CPU) for key in keys])
    equal = (rows.unsqueeze(0) == rows.unsqueeze(1)).sum(dim=2).fill_diagonal_(0)
    assert equal.max() <= 3  # of 1,000 numbers, where one in 65,536 is by chance


def excess(left: torch.Tensor, right: torch.Tensor) -> float:
    """How many deviations the chi-squared of pairs of bytes is off that of independent uniform ones."""
    counts = torch.bincount(left * 256 + right, minlength=65536).double()
    expected = len(left) / 65536
    return ((counts - expected).square().sum().item() / expected - 65535) / (2 * 65535) ** 0.5


@pytest.mark.parametrize("key", [(0, 0), rounding_key(0, 0, 1)])
@pytest.mark.parametrize("shift", [0, 8])
def test_drawn_bits_are_uniform_and_independent_of_neighbours_of_each_other_and_of_the_next_step(key, shift):
    bits, after = (draw_bits(key_, 0, 1 << 20, CPU) >> shift & 255 for key_ in (key, (key[0], key[1] + 1)))
    pairs = [(row[:-1], row[1:]) for row in bits] + [(row[:-2], row[2:]) for row in bits]
    pairs += [(bits[0], bits[1]), (bits[0], bits[2]), (bits[1], bits[2]), *zip(bits, after, strict=True)]
    assert max(abs(excess(left, right)) for left, right in pairs) < 5
