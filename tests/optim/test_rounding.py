import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.optim.rounding import copy_stochastic_, draw_bits, round_stochastic, rounding_generator

ALL_BITS = torch.arange(65536, dtype=torch.int32)
EVERY_BFLOAT16 = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
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
    value = EVERY_BFLOAT16[~EVERY_BFLOAT16.isnan()]
    assert torch.equal(round_stochastic(value.float(), torch.full(value.shape, random_bits, dtype=torch.int32)), value)


def test_nan_stays_nan_and_infinity_stays_infinity():
    value = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    rounded = round_stochastic(value, torch.full((4,), 65535, dtype=torch.int32))
    assert rounded[:2].isnan().all()
    assert rounded[2:].tolist() == [float("inf"), -float("inf")]


def test_finite_values_never_become_infinite():
    largest = torch.finfo(torch.float32).max
    rounded = round_stochastic(torch.tensor([largest, -largest]), torch.full((2,), 65535, dtype=torch.int32))
    assert rounded.tolist() == [LARGEST, -LARGEST]


def test_drawn_rounding_is_unbiased_within_three_standard_errors():
    source = torch.randn(200_000, generator=generator(1))
    target = torch.empty(200_000, dtype=torch.bfloat16)
    copy_stochastic_(target, source, generator())
    error = target.double() - source.double()
    assert abs(error.mean()) < 3 * error.std() / 200_000**0.5
    assert error.abs().max() < 2**-7 * source.abs().max()


def test_a_thousand_small_steps_add_up_where_rounding_to_the_nearest_stands_still():
    stochastic, nearest = torch.ones(2, 10_000, dtype=torch.bfloat16)
    bits = generator()
    for _ in range(1000):
        copy_stochastic_(stochastic, stochastic.float() - 1e-4, bits)
        nearest.copy_(nearest.float() - 1e-4)
    assert (nearest == 1).all()
    assert stochastic.float().mean().item() == pytest.approx(0.9, abs=3 * 0.0195 / 100)
    assert stochastic.float().std().item() == pytest.approx(0.0195, rel=0.05)


def test_a_moment_that_decays_by_0_999_decays():
    moment = torch.ones(10_000, dtype=torch.bfloat16)
    bits = generator()
    for _ in range(1000):
        copy_stochastic_(moment, moment.float() * 0.999, bits)
    assert torch.tensor(0.999).bfloat16() == 1  # what rounding to the nearest would make of it, for ever
    assert moment.float().mean().item() == pytest.approx(0.999**1000, rel=0.01)


def test_float32_targets_take_the_value_as_it_is():
    source = torch.randn(100, generator=generator())
    target = torch.empty(100)
    copy_stochastic_(target, source, generator())
    assert torch.equal(target, source)


def test_rounding_is_a_function_of_the_generator():
    source = torch.randn(1000, generator=generator(9))
    targets = [torch.empty(1000, dtype=torch.bfloat16) for _ in range(3)]
    for target, seed in zip(targets, [4, 4, 5], strict=True):
        copy_stochastic_(target, source, generator(seed))
    assert torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[0], targets[2])


def test_float16_weights_are_refused():
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        copy_stochastic_(torch.empty(2, dtype=torch.float16), torch.ones(2), generator())


def test_the_largest_numbers_are_rounded_up_as_often_as_any_other():
    below = torch.tensor([LARGEST]).view(torch.int32) - 16384  # a quarter of a step below the largest
    rounded = round_stochastic(below.view(torch.float32).expand(65536).contiguous(), ALL_BITS)
    assert (rounded == LARGEST).float().mean().item() == 0.75


def test_drawn_bits_are_uniform_and_each_is_used_once():
    bits = draw_bits(1 << 18, generator())
    counts = torch.bincount(bits >> 8, minlength=256).float()
    assert bits.dtype == torch.int32
    assert (bits.min() >= 0) & (bits.max() < 65536)
    assert ((counts - 1024).square() / 1024).sum() < 400  # chi-square with 255 degrees of freedom: 5 standard deviations would be 368
    assert len(draw_bits(7, generator())) == 7


def test_bits_are_keyed_by_seed_tensor_and_step():
    device = torch.device("cpu")
    keys = [(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (0, 0, 1)]
    drawn = [tuple(draw_bits(16, rounding_generator(seed, index, step, device)).tolist()) for seed, index, step in keys]
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[-1]
