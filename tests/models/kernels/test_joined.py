"""Linear layers joined to one product compute what each does, and keep nothing that is not there anyway."""

import pytest
import torch
import torch.nn.functional as F

from aquatint.models.kernels.joined import joined_linear
from tests.models.kernels.cases import randn
from tests.models.kernels.test_geglu import kept_bytes


def leaves(dtype=torch.float64):
    """x, and three weights with outputs of different lengths."""
    return [randn(seed, *shape).to(dtype).requires_grad_() for seed, shape in enumerate(((2, 5, 6), (4, 6), (3, 6), (7, 6)))]


@pytest.mark.parametrize("count", [2, 3])
def test_outputs_and_gradients_are_those_of_each_layer(count):
    one, other = leaves()[: count + 1], leaves()[: count + 1]
    joined, apart = joined_linear(one[0], *one[1:]), [F.linear(other[0], weight) for weight in other[1:]]
    for number, (found, expected) in enumerate(zip(joined, apart, strict=True)):
        torch.testing.assert_close(found, expected)
        (found * (number + 1)).square().sum().backward(retain_graph=True)
        (expected * (number + 1)).square().sum().backward(retain_graph=True)
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert torch.autograd.gradcheck(lambda *args: torch.cat(joined_linear(*args), dim=-1), one)


def test_the_joined_matrix_does_not_wait_for_the_backward_pass():
    put = leaves(torch.float32)
    assert kept_bytes(joined_linear, *put) == put[0].nbytes


def test_under_autocast_weights_keep_float32_gradients():
    x, *weights = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        parts = joined_linear(x, *weights)
        apart = [F.linear(x, weight) for weight in weights]
    assert all(torch.equal(part, expected) for part, expected in zip(parts, apart, strict=True))
    sum(part.float().sum() for part in parts).backward()
    assert {weight.grad.dtype for weight in weights} == {x.grad.dtype} == {torch.float32}


def test_frozen_weights_get_no_gradient():
    x, *weights = leaves()
    torch.cat(joined_linear(x, *(weight.detach() for weight in weights)), dim=-1).sum().backward()
    assert x.grad.isfinite().all()
    assert all(weight.grad is None for weight in weights)
