"""Reference values of what libraries compute, by hand or from the papers: other numbers in a new version are noticed here."""

import math

import pytest
import torch
from torch import nn

from .library_models import make


def weight_of(*values: float | list[float]) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.tensor(values if isinstance(values[0], list) else [list(values)]))
    return model


def step(model: nn.Module, optimizer, gradient: list[list[float]]) -> None:
    model.weight.grad = torch.tensor(gradient)
    optimizer.step()


def test_lion():
    model = weight_of(1.0)
    optimizer = make("lion", model, learning_rate=1e-4, weight_decay=0.1)
    step(model, optimizer, [[0.1]])
    assert model.weight.item() == pytest.approx(0.99989, abs=1e-7)
    assert optimizer.state[model.weight]["exp_avg"].item() == pytest.approx(0.001, rel=1e-6)


NEWTON_SCHULZ = {0.01: 0.698917, 0.1: 0.712120, 0.3: 1.079592, 0.5: 0.765439, 1.0: 0.696436}


@pytest.mark.parametrize("value", [value for value in NEWTON_SCHULZ if value < 0.5])
def test_muon_makes_singular_values_what_newton_and_schulz_make_of_them(value):
    """The gradient is divided by its Frobenius norm first, so another value beside it makes that 1. torch does it in bf16."""
    beside = math.sqrt(1 - value**2)
    model = weight_of([0.0, 0.0], [0.0, 0.0])
    step(model, make("muon", model, learning_rate=1.0, weight_decay=0.0), [[value, 0.0], [0.0, beside]])
    assert -model.weight[0, 0].item() / (0.2 * math.sqrt(2)) == pytest.approx(NEWTON_SCHULZ[value], rel=0.04)


@pytest.mark.parametrize(("scale", "expected"), [("match_rms_adamw", 0.2 * math.sqrt(4)), ("original", 1.0)])
def test_muon_scales_its_rate_by_the_shape(scale, expected):
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    step(model, make("muon", model, learning_rate=1.0, weight_decay=0.0, rate_scale=scale), [[1.0, 0.0, 0.0, 0.0]])
    assert -model.weight[0, 0].item() == pytest.approx(expected * NEWTON_SCHULZ[1.0], rel=0.04)


def test_schedule_free_is_the_recursion_of_its_paper():
    """y = (1 - b1) z + b1 x; z falls, x is the mean of all z, each weighing the square of the largest rate so far."""
    model, rates, gradients = weight_of(1.0), (0.0, 0.05, 0.1, 0.1), (0.3, -0.2, 0.5, 0.4)
    optimizer = make("schedule_free", model, weight_decay=0.01)
    x = y = z = 1.0
    square = total = largest = 0.0
    for number, (lr, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = lr
        step(model, optimizer, [[gradient]])
        square = 0.999 * square + 0.001 * gradient**2
        z -= lr * (gradient / (math.sqrt(square / (1 - 0.999**number)) + 1e-8) + 0.01 * y)
        largest = max(largest, lr)
        total += largest**2
        x += (largest**2 / total if total else 0.0) * (z - x)
        y = 0.1 * z + 0.9 * x
        assert model.weight.item() == pytest.approx(y, rel=1e-6)
        assert optimizer.state[model.weight]["z"].item() == pytest.approx(z, rel=1e-6)


def test_prodigy_is_the_recursion_of_its_paper_and_counts_each_step_once():
    """Algorithm 4 with Adam's correction and the safeguard: d grows to d_coef times the weighted sums of <g, p0 - p> over |s|."""
    model = weight_of(1.0, -2.0)
    optimizer = make("prodigy", model, weight_decay=0.0, d0=1e-3, d_coef=2.0)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    p, m, v, s = start.clone(), *(torch.zeros(2, dtype=torch.float64) for _ in range(3))
    d = largest = 1e-3
    numerator, beta3 = 0.0, math.sqrt(0.999)
    for number in range(12):
        gradient = p.float()
        dlr = d * math.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        numerator = beta3 * numerator + d / 1e-3 * dlr * (gradient.double() @ (start - p)).item()
        m, v = 0.9 * m + 0.1 * d * gradient, 0.999 * v + 0.001 * d**2 * gradient.double() ** 2
        s = beta3 * s + d / 1e-3 * d * gradient
        estimate = 2.0 * numerator / s.abs().sum().item()
        d = max(d, estimate) if d == 1e-3 else d
        largest = max(largest, estimate)
        d = largest
        p = p - dlr * m / (v.sqrt() + d * 1e-8)
        step(model, optimizer, gradient[None].tolist())
        torch.testing.assert_close(model.weight[0].double(), p, rtol=1e-5, atol=0)
        assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-4)
    assert optimizer.param_groups[0]["k"] == optimizer.state[model.weight]["step"] == 12
    assert d > 1e-3


def test_came_is_algorithm_2_of_its_paper():
    gradients = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, -1.0], [2.0, 0.3]]), torch.tensor([[-1.0, 0.2], [0.7, 0.9]])]
    model = weight_of([1.0, -1.0], [0.5, 2.0])
    p = model.weight.detach().double().clone()
    optimizer = make("came", model, learning_rate=0.1, weight_decay=0.0)
    rows, columns, trust_rows, trust_columns = (torch.zeros(2, dtype=torch.float64) for _ in range(4))
    m = torch.zeros(2, 2, dtype=torch.float64)
    for gradient in gradients:
        g = gradient.double()
        squares = g**2 + 1e-30
        rows, columns = 0.999 * rows + 0.001 * squares.mean(1), 0.999 * columns + 0.001 * squares.mean(0)
        u = g / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = 0.9 * m + 0.1 * u
        distrust = (u - m) ** 2 + 1e-16
        trust_rows, trust_columns = (
            0.9999 * trust_rows + 0.0001 * distrust.mean(1), 0.9999 * trust_columns + 0.0001 * distrust.mean(0),
        )  # fmt: skip
        p = p - 0.1 * m / (trust_rows[:, None] * trust_columns[None] / trust_rows.mean()).sqrt()
        step(model, optimizer, gradient.tolist())
        torch.testing.assert_close(model.weight.detach().double(), p, rtol=1e-4, atol=1e-5)


def test_torch_adafactor_steps_in_proportion_to_the_size_of_a_tensor():
    model = weight_of([2.0, 2.0], [2.0, 2.0])
    step(model, make("torch_adafactor", model, learning_rate=0.01), [[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[0.77459667, 1.09544512], [1.03923048, 0.97979590]])
    torch.testing.assert_close((2.0 - model.weight.detach()) / (0.01 * 2.0), expected, rtol=1e-4, atol=0)
