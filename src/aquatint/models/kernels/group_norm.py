"""GroupNorm (arXiv 1803.08494), with a shift per channel before it and SiLU after it, over pictures whose channels lie last in memory.

Statistics, and the gradients of weight and bias, are float32 whatever the pictures are, and every result is rounded once. On a GPU the
three operations are the kernels of `group_norm_triton`; here they are plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from aquatint.models.kernels.precision import math_dtype, result_dtype

LAST = torch.channels_last


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, shift: Tensor | None = None, silu: bool = False
) -> Tensor:
    """Normed pictures (B, C, H, W), with channels last. `shift` (B, C) is added to `x` first; `silu` is taken at the end."""
    normed: Tensor = _GroupNorm.apply(x, shift, weight, bias, groups, eps, silu, result_dtype(x))  # type: ignore[no-untyped-call]
    return normed


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        normed, mean, rstd = normalise(x, shift, weight, bias, groups, eps, silu, dtype)
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.silu = silu
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=LAST)
        sums = gradient_sums(grad, x, shift, weight, bias, mean, rstd, ctx.silu)
        means = group_means(sums, weight, mean, x.shape)
        of_x = input_gradient(grad, x, shift, weight, bias, mean, rstd, means, ctx.silu) if ctx.needs_input_grad[0] else None
        of_shift = None if shift is None else shift_gradient(sums, weight, rstd, means, x.shape).to(shift.dtype)
        of_weight, of_bias = sums[1].sum(dim=0).to(weight.dtype), sums[0].sum(dim=0).to(bias.dtype)
        return of_x, of_shift, of_weight, of_bias, None, None, None, None


@custom_op("aquatint::group_norm", mutates_args=())
def normalise(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The result in `dtype`; mean and inverse deviation (B, groups) of each group. All pictures here have their channels last."""
    rows = shifted(x, shift)
    var, mean = torch.var_mean(rows.unflatten(2, (groups, -1)), dim=(1, 3), correction=0)
    rstd = (var + eps).rsqrt()
    scaled = centred(rows, mean, rstd) * weight + bias
    return as_pictures(scaled * scaled.sigmoid() if silu else scaled, x, dtype), mean, rstd


@custom_op("aquatint::group_norm_sums", mutates_args=())
def gradient_sums(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """Over the places of each picture and channel, (3, B, C): the gradient before SiLU, that times the normed `x`, the normed `x`."""
    normed, before = backwards(grad, x, shift, weight, bias, mean, rstd, silu)
    return torch.stack([part.sum(dim=1) for part in (before, before * normed, normed)])


@custom_op("aquatint::group_norm_input_gradient", mutates_args=())
def input_gradient(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, means: Tensor, silu: bool
) -> Tensor:
    """The gradient of `x`. `means` (2, B, groups) is of `group_means`."""
    normed, before = backwards(grad, x, shift, weight, bias, mean, rstd, silu)
    first, second, scale = (spread(part, x.shape[1]).unsqueeze(1) for part in (*means, rstd))
    return as_pictures(scale * (before * weight - (first + normed * second)), x, x.dtype)


def group_means(sums: Tensor, weight: Tensor, mean: Tensor, shape: torch.Size) -> Tensor:
    """Over each group, (2, B, groups): the gradient of the normed `x`, and that times the normed `x`."""
    batch, groups = mean.shape
    count = shape[1] // groups * shape[2] * shape[3]
    found: Tensor = (sums[:2] * weight).view(2, batch, groups, -1).sum(dim=3) / count
    return found


def shift_gradient(sums: Tensor, weight: Tensor, rstd: Tensor, means: Tensor, shape: torch.Size) -> Tensor:
    """The sum of the gradient of `x` over places, (B, C), from the sums of its parts."""
    first, second, scale = (spread(part, shape[1]) for part in (*means, rstd))
    return scale * (sums[0] * weight - (shape[2] * shape[3] * first + sums[2] * second))


# plain torch on rows (B, places, C)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    rows = x.permute(0, 2, 3, 1).flatten(1, 2).to(math_dtype(x))
    return rows if shift is None else rows + shift.unsqueeze(1)


def centred(rows: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (rows - spread(mean, rows.shape[2]).unsqueeze(1)) * spread(rstd, rows.shape[2]).unsqueeze(1)


def spread(of_groups: Tensor, channels: int) -> Tensor:
    """(B, groups) to (B, C)."""
    return of_groups.repeat_interleave(channels // of_groups.shape[1], dim=1)


def backwards(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """The normed `x` again, and the gradient before SiLU."""
    normed, before = centred(shifted(x, shift), mean, rstd), shifted(grad, None)
    if silu:
        scaled = normed * weight + bias
        gate = scaled.sigmoid()
        before = before * (gate * (1 + scaled * (1 - gate)))
    return normed, before


def as_pictures(rows: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as pictures of the size of `like`, with channels last, in memory of their own."""
    found = torch.empty_like(like, dtype=dtype)
    return found.copy_(rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2))


# what a kernel gives, for those who only ask for its shape


@normalise.register_fake
def _(x: Any, shift: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    statistics = x.new_empty(x.shape[0], groups, dtype=math_dtype(x))
    return torch.empty_like(x, dtype=dtype), statistics, torch.empty_like(statistics)


@gradient_sums.register_fake
def _(grad: Any, x: Any, shift: Any, weight: Any, bias: Any, mean: Any, rstd: Any, silu: bool) -> Tensor:
    return x.new_empty(3, *x.shape[:2], dtype=math_dtype(x))


@input_gradient.register_fake
def _(grad: Any, x: Any, shift: Any, weight: Any, bias: Any, mean: Any, rstd: Any, means: Any, silu: bool) -> Tensor:
    return torch.empty_like(x)


# on a GPU


@normalise.register_kernel("cuda")
def _(x: Any, shift: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    from aquatint.models.kernels import group_norm_triton

    return group_norm_triton.normalise(x, shift, weight, bias, groups, eps, silu, dtype)


@gradient_sums.register_kernel("cuda")
def _(grad: Any, x: Any, shift: Any, weight: Any, bias: Any, mean: Any, rstd: Any, silu: bool) -> Tensor:
    from aquatint.models.kernels import group_norm_triton

    return group_norm_triton.gradient_sums(grad, x, shift, weight, bias, mean, rstd, silu)


@input_gradient.register_kernel("cuda")
def _(grad: Any, x: Any, shift: Any, weight: Any, bias: Any, mean: Any, rstd: Any, means: Any, silu: bool) -> Tensor:
    from aquatint.models.kernels import group_norm_triton

    return group_norm_triton.input_gradient(grad, x, shift, weight, bias, mean, rstd, means, silu)
