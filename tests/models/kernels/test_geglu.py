"""GEGLU and the product after it: against torch's own in float64, no less exact in bf16, and with half as much kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aquatint.models.kernels import geglu as ours
from aquatint.models.kernels.geglu import geglu, geglu_linear
from tests.models.kernels.cases import randn

ROWS, SIZE, OUTPUTS = 5, 77, 11


def by_torch(projected, weight, bias):
    hidden, gate = projected.chunk(2, dim=-1)
    return F.linear(hidden * F.gelu(gate), weight, bias)


def by_layers(projected, weight, bias):
    return F.linear(geglu(projected), weight, bias)


def results(function, dtype):
    """The output and the gradients of projection, weight and bias, in float64; inputs are those of bf16."""
    shapes = ((2, ROWS, 2 * SIZE), (OUTPUTS, SIZE), (OUTPUTS,))
    put = [(randn(seed, *shape) * 1.5).bfloat16().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    output = function(*put)
    output.backward(randn(9, *output.shape).bfloat16().to(dtype))
    return [output.detach().double(), *(tensor.grad.double() for tensor in put)]


def error(expected, found):
    return float((expected - found).norm() / expected.norm())


@pytest.mark.parametrize("function", [by_layers, geglu_linear])
def test_it_is_that_of_torch(function):
    exact = results(by_torch, torch.float64)
    assert max(map(error, exact, results(function, torch.float64))) < 1e-12
    assert max(map(error, exact, results(function, torch.float32))) < 1e-5
    plain, found = results(by_torch, torch.bfloat16), results(function, torch.bfloat16)
    for reference, of_torch, of_ours in zip(exact, plain, found, strict=True):
        assert error(reference, of_ours) <= 1.1 * error(reference, of_torch)


def test_gradients_are_those_of_finite_differences():
    put = [value.double().requires_grad_() for value in (randn(0, 3, 8), randn(1, 2, 4), randn(2, 2))]
    assert torch.autograd.gradcheck(geglu, put[:1])
    assert torch.autograd.gradcheck(geglu_linear, put)


def kept_bytes(function, *put):
    """Of what waits for the backward pass, without weights."""
    there = {tensor.untyped_storage().data_ptr() for tensor in put[1:]}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*put)
    return sum(size for pointer, size in found.items() if pointer not in there)


def test_only_the_projection_waits_for_the_backward_pass():
    put = [randn(seed, *shape).requires_grad_() for seed, shape in enumerate(((ROWS, 2 * SIZE), (OUTPUTS, SIZE), (OUTPUTS,)))]
    assert kept_bytes(geglu_linear, *put) == 4 * ROWS * 2 * SIZE
    assert kept_bytes(by_layers, *put) == 4 * ROWS * 3 * SIZE
    assert kept_bytes(by_torch, *put) == 4 * ROWS * 4 * SIZE


def test_a_frozen_layer_gets_no_gradient():
    projected, weight = randn(0, ROWS, 2 * SIZE).requires_grad_(), randn(1, OUTPUTS, SIZE)
    geglu_linear(projected, weight, None).sum().backward()
    assert weight.grad is None
    assert projected.grad.isfinite().all()


def test_under_autocast_weights_keep_float32_gradients():
    shapes = ((ROWS, 2 * SIZE), (OUTPUTS, SIZE), (OUTPUTS,))
    projected, weight, bias = (randn(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes))
    with torch.autocast("cpu", torch.bfloat16):
        output = geglu_linear(projected.bfloat16(), weight, bias)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_who_asks_for_shapes_alone_is_told_the_right_ones():
    projected, grad = randn(0, ROWS, 2 * SIZE).bfloat16(), randn(1, ROWS, SIZE).bfloat16()
    for operation, put in ((ours.gate, (projected,)), (ours.gate_gradient, (grad, projected))):
        opcheck(operation, put, test_utils=("test_schema", "test_faketensor"))
