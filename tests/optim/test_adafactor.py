import math

import pytest
import torch
from torch.nn import Parameter

from aquatint.optim import flat
from aquatint.optim.adafactor import Adafactor, Factors, clip_scale, factored, second_moment_decay, unfactored

G = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(param: Parameter, steps: int, **settings) -> Adafactor:
    optimizer = Adafactor([param], seed=0, **settings)
    for step in range(steps):
        param.grad = randn(50 + step, *param.shape).to(param.dtype) * (1 + step % 3)
        optimizer.step()
    return optimizer


def test_first_update_of_a_matrix_matches_its_vector():
    factors, row, col = factored(G, torch.zeros(2), torch.zeros(2), second_moment_decay(1, 0.8))
    update = G * factors.left * factors.right
    assert row.tolist() == [2.5, 12.5]
    assert col.tolist() == [5.0, 10.0]
    assert (G / update).square().flatten().tolist() == pytest.approx([1.66666667, 3.33333333, 8.33333333, 16.66666667], rel=1e-6)
    assert update.flatten().tolist() == pytest.approx([0.77459667, 1.09544512, 1.03923048, 0.97979590], rel=1e-6)
    assert update.square().mean().sqrt().item() == pytest.approx(0.97979590, rel=1e-6)
    assert clip_scale(G, factors, 1.0) == 1.0


def test_second_moment_decay_matches_its_vector():
    assert [second_moment_decay(step, 0.8) for step in (1, 2, 100)] == pytest.approx([0.0, 0.42565082, 0.97488114], rel=1e-6)


def test_a_gradient_of_rank_one_is_normalised_to_signs():
    """Where g^2 is a product of rows and columns the factored V is exact."""
    grad = randn(0, 6, 1) * randn(1, 1, 9)
    factors, _, _ = factored(grad, torch.zeros(6), torch.zeros(9), 0.0)
    torch.testing.assert_close(grad * factors.left * factors.right, grad.sign())


def test_vectors_are_not_factored():
    grad, old = randn(0, 10), randn(1, 10).square()
    torch.testing.assert_close(unfactored(grad, old, 0.75), 0.75 * old + 0.25 * grad.square())


def test_each_of_several_vectors_is_clipped_on_its_own():
    """At the first step an update is the gradient's signs, of root mean square 1."""
    params = [Parameter(torch.zeros(size)) for size in (3, 40, 500)]
    optimizer = Adafactor(params, lr=0.5, clip_threshold=0.25, seed=0)
    for index, param in enumerate(params):
        param.grad = randn(index, len(param)) * 10**index
    optimizer.step()
    assert len(optimizer.units()) == 1
    for param in params:
        torch.testing.assert_close(param.detach(), -0.5 * 0.25 * param.grad.sign())
        torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], param.grad.square())


def test_large_updates_are_clipped_and_small_ones_are_not_amplified():
    grad = randn(0, 20, 30)
    ones = Factors(torch.ones(20, 1), torch.ones(30))
    for strength, expected in [(4.0, 2.0), (0.01, 0.01)]:
        scaled = grad * strength / grad.square().mean().sqrt()
        clipped = scaled * clip_scale(scaled, ones, 2.0)
        assert clipped.square().mean().sqrt().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(37, 5), (8, 3, 3, 3), (70,)])
def test_a_matrix_in_pieces_is_updated_as_in_one(shape, monkeypatch):
    whole, cut = Parameter(randn(0, *shape)), Parameter(randn(0, *shape))
    train(whole, 5, lr=1e-2)
    monkeypatch.setattr(flat, "CPU_PIECE", 16)
    train(cut, 5, lr=1e-2)
    torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-7)


def test_zero_gradients_change_nothing():
    param = Parameter(G.clone())
    optimizer = Adafactor([param], lr=0.1, seed=0)
    for _ in range(3):
        param.grad = torch.zeros(2, 2)
        optimizer.step()
    assert torch.equal(param.detach(), G)


@pytest.mark.parametrize(("weight_decay", "clip_threshold", "decay_power"), [(0.0, 1.0, 0.8), (0.1, 0.5, 0.6)])
@pytest.mark.parametrize("shape", [(12, 7), (9,)])
def test_trajectory_is_that_of_transformers(shape, weight_decay, clip_threshold, decay_power):
    from transformers.optimization import Adafactor as Theirs

    our, their = Parameter(randn(0, *shape)), Parameter(randn(0, *shape))
    train(our, 200, lr=1e-2, weight_decay=weight_decay, clip_threshold=clip_threshold, decay_power=decay_power)
    optimizer = Theirs(
        [their],
        lr=1e-2,
        clip_threshold=clip_threshold,
        decay_rate=-decay_power,
        weight_decay=weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    for step in range(200):
        their.grad = randn(50 + step, *shape) * (1 + step % 3)
        optimizer.step()
    torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_a_convolution_is_updated_as_the_matrix_of_its_filters():
    convolution, matrix = Parameter(randn(0, 6, 4, 3, 3)), Parameter(randn(0, 6, 4, 3, 3).flatten(1))
    train(convolution, 5, lr=1e-2)
    optimizer = Adafactor([matrix], lr=1e-2, seed=0)
    for step in range(5):
        matrix.grad = (randn(50 + step, 6, 4, 3, 3) * (1 + step % 3)).flatten(1)
        optimizer.step()
    assert torch.equal(convolution.detach().flatten(1), matrix.detach())


def test_state_of_a_convolution_is_one_float_per_filter_and_per_filter_weight():
    param = torch.empty(1280, 1280, 3, 3, dtype=torch.bfloat16, device="meta")
    optimizer = Adafactor([Parameter(param)], seed=0)
    state = optimizer.initial_state(param, optimizer.param_groups[0])
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "exp_avg_sq_row": (1280,),
        "exp_avg_sq_col": (11520,),
    }
    assert all(value.dtype == torch.float32 for value in state.values())


def test_bfloat16_weights_follow_float32_ones():
    exact, rounded = Parameter(torch.ones(64, 64)), Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    for param in (exact, rounded):
        optimizer = Adafactor([param], lr=1e-4, seed=0)
        for _ in range(300):
            param.grad = 2 * (param.detach() - 0.9)
            optimizer.step()
    assert exact.mean().item() < 0.975
    assert rounded.float().mean().item() == pytest.approx(exact.mean().item(), abs=0.002)


def test_a_step_is_as_large_as_the_learning_rate_whatever_the_gradient():
    for scale in (1e-6, 1.0, 1e6):
        param = Parameter(torch.zeros(40, 50))
        optimizer = Adafactor([param], lr=1e-3, seed=0)
        param.grad = randn(0, 40, 50) * scale
        optimizer.step()
        rms = param.detach().square().mean().sqrt().item()
        assert 0.9e-3 < rms <= 1.0001e-3
        assert math.isfinite(rms)


def test_weight_decay_shrinks_weights_by_the_learning_rate():
    param = Parameter(torch.full((3, 3), 2.0))
    optimizer = Adafactor([param], lr=0.1, weight_decay=0.5, seed=0)
    param.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3, 3), 2.0 * 0.95))


def test_step_returns_the_loss_of_a_closure_and_skips_weights_without_gradient():
    used, unused = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    optimizer = Adafactor([used, unused], lr=0.1, seed=0)

    def closure() -> float:
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert (used < 1).all()
    assert (unused == 1).all()
    assert unused not in optimizer.state
