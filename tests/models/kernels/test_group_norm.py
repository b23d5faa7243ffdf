"""GroupNorm with what is around it: against torch's own in float64, and no less exact than torch's in bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aquatint.models.kernels import group_norm as ours
from aquatint.models.kernels.group_norm import group_norm
from tests.models.kernels.cases import EPS, NORMS, randn


def leaves(name, dtype, *, centre=0.0):
    """x, weight, bias, shift."""
    shape, groups = NORMS[name]
    values = (randn(0, *shape) + centre, randn(1, shape[1]), randn(2, shape[1]), randn(3, *shape[:2]))
    return [value.to(dtype).requires_grad_() for value in values], groups


def by_torch(x, weight, bias, groups, shift, *, silu):
    normed = F.group_norm(x + shift[:, :, None, None], groups, weight, bias, EPS)
    return F.silu(normed) if silu else normed


def by_us(x, weight, bias, groups, shift, *, silu):
    return group_norm(x, weight, bias, groups, EPS, shift=shift, silu=silu)


def results(function, name, dtype, *, silu=True, arrange=lambda x: x, centre=0.0):
    """The output and the gradients of x, weight, bias and shift, in float64; inputs are those of float32 rounded to `dtype`."""
    (x, weight, bias, shift), groups = leaves(name, torch.float32, centre=centre)
    put = [tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in (x, weight, bias, shift)]
    output = function(arrange(put[0]), put[1], put[2], groups, put[3], silu=silu)
    output.backward(randn(9, *output.shape).bfloat16().to(output.dtype))
    return [output.detach().double(), *(tensor.grad.double() for tensor in put)]


def error(expected, found):
    return float((expected - found).norm() / expected.norm())


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_it_is_the_norm_of_torch(name, silu):
    expected = results(by_torch, name, torch.float64, silu=silu)
    assert max(map(error, expected, results(by_us, name, torch.float64, silu=silu))) < 1e-12
    assert max(map(error, expected, results(by_us, name, torch.float32, silu=silu))) < 1e-5


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, shift = (value.double().requires_grad_() for value in (randn(0, 2, 4, 3, 1), randn(1, 4), randn(2, 4), randn(3, 2, 4)))
    assert torch.autograd.gradcheck(lambda *args: group_norm(*args[:3], 2, EPS, shift=args[3], silu=True), (x, weight, bias, shift))


@pytest.mark.parametrize("name", NORMS)
def test_in_bf16_no_result_is_further_from_the_truth_than_that_of_torch(name):
    """Weight and bias gradients too, with channels last: a compiled norm was once wrong there (pytorch issue 140913)."""
    exact = results(by_torch, name, torch.float64)

    def turned(x):
        return x.contiguous(memory_format=torch.channels_last)

    plain, found = results(by_torch, name, torch.bfloat16, arrange=turned), results(by_us, name, torch.bfloat16, arrange=turned)
    for reference, of_torch, of_ours in zip(exact, plain, found, strict=True):
        assert error(reference, of_ours) <= 1.1 * error(reference, of_torch)
        assert error(reference, of_ours) < 4e-3  # a rounding to 8 bits


def test_a_large_mean_costs_no_digits():
    exact = results(by_torch, "40 channels", torch.float64, centre=1000.0)
    found = results(by_us, "40 channels", torch.float32, centre=1000.0)
    assert max(map(error, exact, found)) < 1e-3


def test_channels_come_last_whatever_comes_in_and_gradients_go_back_so():
    (x, weight, bias, _), groups = leaves("20 channels", torch.float32)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    one, other = (group_norm(each, weight, bias, groups, EPS) for each in (x, last))
    assert torch.equal(one, other)
    assert one.is_contiguous(memory_format=torch.channels_last)
    other.square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_under_autocast_the_result_is_rounded_once_and_weights_keep_float32_gradients():
    (x, weight, bias, shift), groups = leaves("10 channels", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_us(x, weight, bias, groups, shift, silu=True)
    assert torch.equal(found, by_us(x, weight, bias, groups, shift, silu=True).bfloat16())
    found.sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_asks_for_shapes_alone_is_told_the_right_ones(dtype):
    (x, weight, bias, shift), groups = leaves("10 channels", dtype)
    put = [value.detach() for value in (x.contiguous(memory_format=torch.channels_last), shift, weight, bias)]
    forward = (*put, groups, EPS, True, torch.bfloat16)
    normed, mean, rstd = ours.normalise(*forward)
    backward = (torch.ones_like(put[0]), *put, mean, rstd)
    assert normed.dtype == torch.bfloat16
    tests = ("test_schema", "test_faketensor")
    opcheck(ours.normalise, forward, test_utils=tests)
    opcheck(ours.gradient_sums, (*backward, True), test_utils=tests)
    opcheck(ours.input_gradient, (*backward, torch.ones(2, *mean.shape), True), test_utils=tests)
