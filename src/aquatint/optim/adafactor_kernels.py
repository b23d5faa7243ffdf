"""Adafactor's three passes over a matrix as Triton kernels for a GPU: 10 bytes a bfloat16 weight are moved. Importing this needs Triton.

Each function does what the one of its name in `adafactor` does. `update_` has its bits; sums are taken in another order, which is the
same at each call. Matrices are cut into tiles, each of which one program does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquatint.optim.kernels import check_contiguous, drawn, store
from aquatint.optim.rounding import Key, key_constants

TILE, COLUMNS = 4096, 128  # elements of a tile, and how many of a row: larger ones are code that overflows the instruction caches


@triton.jit  # type: ignore[untyped-decorator]
def _tile(rows, width, num_rows: tl.constexpr, num_columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (r, 1) and columns (1, c) of a tile, where they are in the matrix, and which elements exist."""
    row = (tl.program_id(0) * num_rows + tl.arange(0, num_rows))[:, None]
    col = (tl.program_id(1) * num_columns + tl.arange(0, num_columns))[None, :]
    return row, col, row * width + col, (row < rows) & (col < width)


@triton.jit  # type: ignore[untyped-decorator]
def _squares_kernel(grad, row_parts, col_parts, rows, width, num_rows: tl.constexpr, num_columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the rows and the columns of a tile, to (tiles beside each other, O) and (tiles below each other, I)."""
    row, col, own, mask = _tile(rows, width, num_rows, num_columns)
    gradient = tl.load(grad + own, mask, 0.0).to(tl.float32)
    square = gradient * gradient
    tl.store(row_parts + tl.program_id(1) * rows + row, tl.sum(square, axis=1, keep_dims=True), mask=row < rows)
    tl.store(col_parts + tl.program_id(0) * width + col, tl.sum(square, axis=0, keep_dims=True), mask=col < width)


@triton.jit  # type: ignore[untyped-decorator]
def _update_squares_kernel(grad, left, right, parts, rows, width, num_rows: tl.constexpr, num_columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum over a tile."""
    row, col, own, mask = _tile(rows, width, num_rows, num_columns)
    update = tl.load(grad + own, mask, 0.0).to(tl.float32) * tl.load(left + row, row < rows, 0.0) * tl.load(right + col, col < width, 0.0)
    total = tl.sum(tl.sum(update * update, axis=1), axis=0)
    tl.store(parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit(do_not_specialize=["first", "x0", "y0", "z0"])  # type: ignore[untyped-decorator]
def _update_kernel(  # type: ignore[no-untyped-def]
    weights, grad, left, right, finite, rows, width, first, x0, y0, z0, decay, num_rows: tl.constexpr, num_columns: tl.constexpr
):
    row, col, own, mask = _tile(rows, width, num_rows, num_columns)
    if finite is not None:
        mask = tl.where(tl.load(finite), mask, False)
    gradient = tl.load(grad + own, mask, 0.0).to(tl.float32)
    update = gradient * tl.load(left + row, row < rows, 0.0) * tl.load(right + col, col < width, 0.0)
    value = decay * tl.load(weights + own, mask, 0.0).to(tl.float32) - update
    third = (width + 2) // 3  # as in `rounding.draw_rows`: one place has the numbers of three weights of a row
    word = col // third
    x, y, z = drawn((first + row) * third + (col - word * third), x0, y0, z0)
    store(weights + own, value, tl.where(word == 0, x, tl.where(word == 1, y, z)), mask)


def squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """As `adafactor.squares`. Raises ValueError for a tensor that is not contiguous."""
    check_contiguous([grad])
    (down, across), shape = _grid(grad)
    row_parts = torch.empty(across, grad.shape[0], dtype=torch.float32, device=grad.device)
    col_parts = torch.empty(down, grad.shape[1], dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
        _squares_kernel[(down, across)](grad, row_parts, col_parts, *grad.shape, *shape, enable_fp_fusion=False)
    return row_parts.sum(dim=0), col_parts.sum(dim=0)


def update_squares(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `adafactor.update_squares`. Raises ValueError for a tensor that is not contiguous."""
    check_contiguous([grad, left, right])
    grid, shape = _grid(grad)
    parts = torch.empty(grid, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
        _update_squares_kernel[grid](grad, left, right, parts, *grad.shape, *shape, enable_fp_fusion=False)
    return parts.sum()


def update_(
    weights: Tensor, grad: Tensor, left: Tensor, right: Tensor, decay: float, key: Key, first: int = 0, finite: Tensor | None = None
) -> None:
    """As `adafactor.update_`. Raises ValueError for a tensor that is not contiguous."""
    check_contiguous([weights, grad, left, right])
    grid, shape = _grid(grad)
    with torch.cuda.device_of(weights):  # type: ignore[no-untyped-call]
        _update_kernel[grid](
            weights, grad, left, right, finite, *grad.shape, first, *key_constants(key), decay, *shape, enable_fp_fusion=False
        )


def _grid(matrix: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many tiles there are below and beside each other, and rows and columns of each."""
    columns = min(COLUMNS, triton.next_power_of_2(matrix.shape[1]))
    rows = min(TILE // columns, triton.next_power_of_2(matrix.shape[0]))
    return (triton.cdiv(matrix.shape[0], rows), triton.cdiv(matrix.shape[1], columns)), (rows, columns)
