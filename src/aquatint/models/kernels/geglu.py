"""GEGLU (arXiv 2002.05202): one half of a projection times the exact GELU of the other, and the matrix product that follows.

Only the projection is kept for the backward pass; the product with the gate is computed again. The arithmetic is float32, rounded once.
On a GPU the two operations are the kernels of `geglu_triton`; here they are plain torch.
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from aquatint.models.kernels.precision import math_dtype


def geglu(projected: Tensor) -> Tensor:
    """(..., 2 * n) to (..., n)."""
    gated: Tensor = _Geglu.apply(projected)  # type: ignore[no-untyped-call]
    return gated


def geglu_linear(projected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear(geglu(projected))`, which keeps no more than `projected`. `weight` (outputs, n)."""
    dtype = projected.dtype
    result: Tensor = _GegluLinear.apply(projected, weight.to(dtype), None if bias is None else bias.to(dtype))  # type: ignore[no-untyped-call]
    return result


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        return gate(projected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        return gate_gradient(grad.contiguous(), projected)[0]


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected, weight)
        return F.linear(gate(projected), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, weight = ctx.saved_tensors
        of_projected, gated = gate_gradient((grad @ weight).contiguous(), projected)
        rows = grad.flatten(0, -2)
        of_weight = rows.t() @ gated.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_projected, of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


@custom_op("aquatint::geglu", mutates_args=())
def gate(projected: Tensor) -> Tensor:
    """The first half times GELU of the second."""
    hidden, gates = projected.to(math_dtype(projected)).chunk(2, dim=-1)
    return (hidden * F.gelu(gates)).to(projected.dtype)


@custom_op("aquatint::geglu_gradient", mutates_args=())
def gate_gradient(grad: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the projection, and what `gate` gave, again."""
    hidden, gates = projected.to(math_dtype(projected)).chunk(2, dim=-1)
    share = 0.5 * (1 + torch.erf(gates * 0.5**0.5))  # of the normal distribution, below the gate
    density = torch.exp(-0.5 * gates * gates) / (2 * pi) ** 0.5
    parts = grad * (gates * share), grad * hidden * (share + gates * density)
    return torch.cat(parts, dim=-1).to(projected.dtype), (hidden * gates * share).to(projected.dtype)


def _half(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@gate.register_fake
def _(projected: Any) -> Tensor:
    return _half(projected)


@gate_gradient.register_fake
def _(grad: Any, projected: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(projected), _half(projected)


@gate.register_kernel("cuda")
def _(projected: Any) -> Tensor:
    from aquatint.models.kernels import geglu_triton

    return geglu_triton.gate(projected)


@gate_gradient.register_kernel("cuda")
def _(grad: Any, projected: Any) -> tuple[Tensor, Tensor]:
    from aquatint.models.kernels import geglu_triton

    return geglu_triton.gate_gradient(grad, projected)
