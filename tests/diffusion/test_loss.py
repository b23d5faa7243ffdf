import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.loss import HUBER_SCHEDULES, LOSSES, huber_c, masked_loss_with_prior, per_sample_loss, per_sample_mse
from aquatint.diffusion.schedule import sdxl_schedule

ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_loss_is_the_mean_over_each_sample_on_its_own():
    output = torch.stack([torch.full((4, 2, 3), 1.0), torch.full((4, 2, 3), -2.0)])
    assert per_sample_mse(output, torch.zeros(2, 4, 2, 3)).tolist() == [1.0, 4.0]


@EVERY_LOSS
def test_loss_of_half_precision_outputs_is_computed_in_float32(loss):
    target = torch.full((1, 4, 8, 8), 1.0 + 2**-12)
    value = per_sample_loss(loss, torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), target, c=1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2.0**-24, rel=1e-6)


@EVERY_LOSS
def test_gradient_of_a_sample_does_not_see_the_others(loss):
    output = torch.zeros(3, 4, 2, 2, requires_grad=True)
    per_sample_loss(loss, output, torch.ones(3, 4, 2, 2))[1].backward()
    assert output.grad is not None
    assert (output.grad.flatten(1).abs().sum(dim=1) > 0).tolist() == [False, True, False]


def test_mse_is_one_of_the_losses():
    output, target, mask = randn(3, 4, 5, 6), torch.zeros(3, 4, 5, 6), torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(per_sample_loss("mse", output, target), per_sample_mse(output, target))
    assert torch.equal(per_sample_loss("mse", output, target, mask), per_sample_mse(output, target, mask))


@given(d=st.floats(-100, 100), c=st.floats(1e-3, 10))
@settings(max_examples=100, deadline=None)
def test_huber_is_its_formula_without_its_cancellation(d, c):
    """In float32 the formula as written would lose half its digits at |d| = c / 1000."""
    square, bend = torch.tensor(d, dtype=torch.float32).double() ** 2, torch.tensor(c, dtype=torch.float32).double()
    exact = (2 * bend * square / ((square + bend**2).sqrt() + bend)).item()
    difference, zero = torch.full((1, 1, 1, 1), d), torch.zeros(1, 1, 1, 1)
    assert per_sample_loss("huber", difference, zero, c=c).item() == pytest.approx(exact, rel=1e-5, abs=1e-37)
    assert per_sample_loss("smooth_l1", difference, zero, c=c).item() == pytest.approx(exact / bend.item(), rel=1e-5, abs=1e-37)
    if abs(d) > c:
        assert exact == pytest.approx((2 * bend * ((square + bend**2).sqrt() - bend)).item(), rel=1e-9)


def test_huber_is_a_square_near_zero_and_a_line_far_away():
    zero = torch.zeros(1, 1, 1, 1)
    assert per_sample_loss("huber", zero + 1e-4, zero, c=0.1).item() == pytest.approx(1e-8, rel=1e-5)
    assert per_sample_loss("smooth_l1", zero + 1e-4, zero, c=0.1).item() == pytest.approx(1e-7, rel=1e-5)
    assert per_sample_loss("huber", zero + 1e4, zero, c=0.1).item() == pytest.approx(2 * 0.1 * 1e4, rel=1e-4)
    assert per_sample_loss("huber", zero + 3.0, zero, c=1e4).item() == pytest.approx(9.0, rel=1e-4)


def test_each_sample_bends_at_its_own_c():
    output, target = randn(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)
    together = per_sample_loss("huber", output, target, c=torch.tensor([0.01, 0.1, 1.0]))
    alone = [per_sample_loss("huber", output[i : i + 1], target[i : i + 1], c=c).item() for i, c in enumerate((0.01, 0.1, 1.0))]
    assert together.tolist() == pytest.approx(alone)


@EVERY_LOSS
def test_no_gradient_is_lost_at_a_perfect_output(loss):
    output = torch.zeros(1, 4, 2, 2, requires_grad=True)
    per_sample_loss(loss, output, torch.zeros(1, 4, 2, 2)).sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad, torch.zeros(1, 4, 2, 2))


@EVERY_LOSS
def test_a_mask_gives_the_mean_over_its_part(loss):
    output, target = randn(2, 4, 4, 6), torch.zeros(2, 4, 4, 6)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2, :3] = 1
    inside = per_sample_loss(loss, output[:, :, :2, :3], target[:, :, :2, :3])
    torch.testing.assert_close(per_sample_loss(loss, output, target, mask), inside)
    torch.testing.assert_close(per_sample_loss(loss, output, target, 0.25 * mask), inside)


@pytest.mark.parametrize("schedule", HUBER_SCHEDULES)
def test_huber_schedules_end_at_c_and_scale(schedule):
    table = huber_c(schedule, ZERO_TERMINAL.ve_sigmas, 0.1)
    assert table.shape == (1000,)
    assert table.dtype == torch.float32
    assert table[999].item() == pytest.approx(0.1, rel=3e-3)
    assert (table.diff() <= 0).all()
    torch.testing.assert_close(huber_c(schedule, ZERO_TERMINAL.ve_sigmas, 0.1, scale=2.5), 2.5 * table)


@EVERY_LOSS
def test_outside_of_the_mask_the_prior_is_the_target(loss):
    output, target, prior = randn(3, 2, 4, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    expected = per_sample_loss(loss, output, target, mask) + 0.5 * per_sample_loss(loss, output, prior, 1 - mask)
    torch.testing.assert_close(masked_loss_with_prior(loss, output, target, prior, mask, prior_weight=0.5), expected)
    assert torch.equal(masked_loss_with_prior(loss, prior, prior, prior, mask, prior_weight=1.0), torch.zeros(2))


@EVERY_LOSS
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masks_without_an_inside_or_an_outside_make_no_nan(loss, value):
    output = randn(2, 4, 2, 2).requires_grad_()
    target, prior = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    mask = torch.full((2, 1, 2, 2), value)
    total = masked_loss_with_prior(loss, output, target, prior, mask, prior_weight=1.0)
    torch.testing.assert_close(total, per_sample_loss(loss, output, target if value else prior))
    total.sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
