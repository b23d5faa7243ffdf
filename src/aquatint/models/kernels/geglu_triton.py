"""`geglu` as Triton kernels. Importing this module needs Triton. Each function takes and gives what the one of its name there does."""

from __future__ import annotations

from math import pi

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquatint.models.kernels.precision import FUSED

ELEMENTS = 1024  # of a row that one program computes
_ELEMENTS = tl.constexpr(ELEMENTS)
_ROOT_HALF, _DENSITY = tl.constexpr(0.5**0.5), tl.constexpr((2 * pi) ** -0.5)


@triton.jit
def _halves(projected, size):  # type: ignore[no-untyped-def]
    """Of this program: its elements of a row of results, where they lie, which there are, and both halves of the projection."""
    place = tl.program_id(1) * _ELEMENTS + tl.arange(0, _ELEMENTS)
    row = tl.program_id(0).to(tl.int64)
    mask, own = place < size, row * 2 * size + place
    hidden, gates = tl.load(projected + own, mask, 0.0).to(tl.float32), tl.load(projected + own + size, mask, 0.0).to(tl.float32)
    return own, row * size + place, mask, hidden, gates


@triton.jit
def _gate_kernel(projected, result, size):  # type: ignore[no-untyped-def]
    _, there, mask, hidden, gates = _halves(projected, size)
    value = hidden * gates * (0.5 * (1 + tl.erf(gates * _ROOT_HALF)))
    tl.store(result + there, value.to(result.dtype.element_ty), mask)


@triton.jit
def _gate_gradient_kernel(grad, projected, of_projected, result, size):  # type: ignore[no-untyped-def]
    own, there, mask, hidden, gates = _halves(projected, size)
    arriving = tl.load(grad + there, mask, 0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gates * _ROOT_HALF))
    density = tl.exp(-0.5 * gates * gates) * _DENSITY
    kind = result.dtype.element_ty
    tl.store(of_projected + own, (arriving * (gates * share)).to(kind), mask)
    tl.store(of_projected + own + size, (arriving * hidden * (share + gates * density)).to(kind), mask)
    tl.store(result + there, (hidden * gates * share).to(kind), mask)


def gate(projected: Tensor) -> Tensor:
    """As `geglu.gate`, of a contiguous tensor."""
    result, grid = _result(projected)
    with torch.cuda.device_of(projected):  # type: ignore[no-untyped-call]
        _gate_kernel[grid](projected, result, result.shape[-1], **FUSED)
    return result


def gate_gradient(grad: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """As `geglu.gate_gradient`, of contiguous tensors."""
    result, grid = _result(projected)
    of_projected = torch.empty_like(projected)
    with torch.cuda.device_of(projected):  # type: ignore[no-untyped-call]
        _gate_gradient_kernel[grid](grad, projected, of_projected, result, result.shape[-1], **FUSED)
    return of_projected, result


def _result(projected: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Memory for what `gate` gives, and programs by row. Raises ValueError for a tensor that is not contiguous."""
    if not projected.is_contiguous():
        raise ValueError("a kernel takes contiguous tensors only")
    result = projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)
    return result, (result.numel() // result.shape[-1], triton.cdiv(result.shape[-1], ELEMENTS))
