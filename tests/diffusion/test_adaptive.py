import pytest
import torch

from aquatint.diffusion.adaptive import LEAST_MEAN, adaptive_weights, no_losses, range_sums, update

UNIFORM = torch.full((1000,), 1e-3)


def after(steps, num_ranges: int = 4, decay: float = 0.9) -> torch.Tensor:
    state = no_losses(num_ranges)
    for timesteps, losses in steps:
        state = update(state, range_sums(torch.tensor(timesteps), torch.tensor(losses), num_ranges), decay=decay)
    return state


def test_without_losses_all_weights_are_one():
    assert torch.equal(adaptive_weights(no_losses(10), UNIFORM), torch.ones(1000))


def test_sums_count_each_range_and_leave_out_what_is_not_finite():
    sums = range_sums(torch.tensor([0, 249, 250, 999, 999]), torch.tensor([1.0, 2.0, 4.0, float("nan"), 8.0]), 4)
    assert sums.tolist() == [[3, 4, 0, 8], [2, 1, 0, 1]]


def test_sums_of_parts_add_up():
    timesteps, losses = torch.arange(0, 1000, 7), torch.rand(143, generator=torch.Generator().manual_seed(0))
    parts = range_sums(timesteps[:50], losses[:50], 20) + range_sums(timesteps[50:], losses[50:], 20)
    torch.testing.assert_close(parts, range_sums(timesteps, losses, 20))


def test_the_first_loss_is_the_mean_and_older_ones_fade_by_the_sample():
    once = after([([0], [4.0])])
    assert (once[0, 0] / once[1, 0]).item() == pytest.approx(4)
    twice = after([([0], [4.0]), ([0], [1.0])])
    assert (twice[0, 0] / twice[1, 0]).item() == pytest.approx((0.9 * 4 + 1) / 1.9)
    one_by_one = after([([0], [3.0])] * 5)
    torch.testing.assert_close(after([([0] * 5, [3.0] * 5)]), one_by_one)


def test_a_range_that_is_not_seen_keeps_its_mean():
    state = after([([0], [4.0]), *[([500], [1.0])] * 10_000])
    assert (state[0, 0] / state[1, 0]).item() == pytest.approx(4)


def test_weights_are_the_inverse_of_the_means_scaled_to_one():
    state = after([([0, 300, 600, 900], [1.0, 2.0, 4.0, 8.0])])
    weights = adaptive_weights(state, UNIFORM)
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)
    inverse = torch.tensor([1 / (mean + LEAST_MEAN) for mean in (1.0, 2.0, 4.0, 8.0)])
    torch.testing.assert_close(weights[[0, 300, 600, 999]], inverse / inverse.mean())


def test_weights_are_scaled_by_how_often_timesteps_come():
    density = torch.zeros(1000)
    density[:500] = 1 / 500
    weights = adaptive_weights(after([([0, 300, 600, 900], [1.0, 2.0, 4.0, 8.0])]), density)
    assert weights[:500].mean().item() == pytest.approx(1, rel=1e-6)


def test_a_range_without_losses_counts_as_the_others():
    weights = adaptive_weights(after([([0, 300], [1.0, 3.0])]), UNIFORM)
    assert (weights[999] / weights[0]).item() == pytest.approx((1 + LEAST_MEAN) / (2 + LEAST_MEAN))


@pytest.mark.parametrize("num_ranges", [0, 3, 2000])
def test_ranges_must_cut_the_timesteps_evenly(num_ranges):
    with pytest.raises(ValueError, match="equal ranges"):
        no_losses(num_ranges)
