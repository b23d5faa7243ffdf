"""Several linear layers of the same input as one matrix product. Their matrices stay apart; they are put side by side for the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquatint.models.kernels.precision import result_dtype


def joined_linear(x: Tensor, first: Tensor, second: Tensor, third: Tensor | None = None) -> list[Tensor]:
    """`linear(x, weight)` of two or three weights. Nothing but `x` and the weights themselves is kept for the backward pass."""
    result: Tensor = _JoinedLinear.apply(x.to(result_dtype(x)), first, second, third)  # type: ignore[no-untyped-call]
    return list(result.split([len(weight) for weight in (first, second, third) if weight is not None], dim=-1))


def side_by_side(first: Tensor, second: Tensor, third: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.cat([weight.to(dtype) for weight in (first, second, third) if weight is not None])


class _JoinedLinear(torch.autograd.Function):
    """Takes no list of weights: torch.compile loses its way there when nothing needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, third: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, first, second, third)
        return F.linear(x, side_by_side(first, second, third, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, third = ctx.saved_tensors
        of_x = grad @ side_by_side(first, second, third, grad.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return of_x, None, None, None
        whole = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(first.dtype)
        parts = whole.split([len(weight) for weight in (first, second, third) if weight is not None])
        return of_x, *parts, *([None] if third is None else [])
