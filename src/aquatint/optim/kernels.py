"""An optimizer's update as one pass over memory: Triton kernels for a GPU. Importing this module needs Triton.

Each function does what the one of its name in `adamw_bf16` or `adamw8bit` does, bit for bit: the random numbers are the same, and every
operation is rounded on its own, as torch does it. So products and sums are not fused, and division and root are the exact ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquatint.optim.blockwise import codebook
from aquatint.optim.formula import coefficients
from aquatint.optim.rounding import LARGEST, MULTIPLIER, NAN_BITS, Key, key_constants
from aquatint.optim.sizes import BLOCK
from aquatint.optim.tensorwise import State

ELEMENTS = 1024  # that one program steps
MOVING = ["start", "x0", "y0", "z0"]  # a kernel is not compiled again for some of their values
_MULTIPLIER, _LARGEST, _NAN_BITS, _BLOCK = (tl.constexpr(number) for number in (MULTIPLIER, LARGEST, NAN_BITS, BLOCK))


@triton.jit
def _half(word, place):  # type: ignore[no-untyped-def]
    """The random number of a place in its word, uint32 in 0..65535."""
    return ((word ^ (word >> 16)) >> ((place & 1) * 16)) & 0xFFFF


@triton.jit
def drawn(place, x0, y0, z0):  # type: ignore[no-untyped-def]
    """What `rounding.draw_bits` draws for a place: three numbers in 0..65535."""
    place = place.to(tl.uint32)
    y0, z0 = y0.to(tl.uint32), z0.to(tl.uint32)
    x = (place >> 1) * _MULTIPLIER + x0.to(tl.uint32)
    y = x * z0 + y0
    z = x * y + z0
    x, y, z = x ^ (x >> 16), y ^ (y >> 16), z ^ (z >> 16)
    x = x + y * z
    y = y + z * x
    z = z + x * y
    return _half(x, place), _half(y, place), _half(z, place)


@triton.jit
def _bits(value):  # type: ignore[no-untyped-def]
    """Of a float32, as int32; for a NaN such that a number of 16 bits can be added."""
    return tl.minimum(value.to(tl.int32, bitcast=True), _NAN_BITS)


@triton.jit
def _upper(bits):  # type: ignore[no-untyped-def]
    """The bfloat16 in a float32's upper half."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _nearest(value):  # type: ignore[no-untyped-def]
    """The bfloat16 nearest to a float32, the even one of two. Triton's own conversion does that too, but its interpreter truncates."""
    bits = _bits(value)
    return _upper(bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def store(pointer, value, random, mask):  # type: ignore[no-untyped-def]
    """As `rounding.copy_stochastic_`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = tl.clamp(value, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(pointer, _upper(_bits(value) + random.to(tl.int32)), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def _advance(param, grad, exp_avg, exp_avg_sq, beta1, rest1, beta2, rest2, decay, step_size, eps):  # type: ignore[no-untyped-def]
    """As `formula.adamw`, float32."""
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (grad * grad)
    param = decay * param - tl.div_rn(step_size * exp_avg, tl.sqrt_rn(exp_avg_sq) + eps)
    return param, exp_avg, exp_avg_sq


@triton.jit(do_not_specialize=MOVING)  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]
    param, grad, exp_avg, exp_avg_sq, compensation, finite, count, start, x0, y0, z0,
    beta1, rest1, beta2, rest2, decay, step_size, eps, size: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * size + tl.arange(0, size)
    mask = own < count
    if finite is not None:
        mask = tl.where(tl.load(finite), mask, False)
    old, gradient = tl.load(param + own, mask, 0.0).to(tl.float32), tl.load(grad + own, mask, 0.0).to(tl.float32)
    first, second = tl.load(exp_avg + own, mask, 0.0).to(tl.float32), tl.load(exp_avg_sq + own, mask, 0.0).to(tl.float32)
    if compensation is not None:
        old = old + tl.load(compensation + own, mask, 0.0).to(tl.float32)
    value, first, second = _advance(old, gradient, first, second, beta1, rest1, beta2, rest2, decay, step_size, eps)
    random_x, random_y, random_z = drawn(own + start, x0, y0, z0)
    store(exp_avg + own, first, random_x, mask)
    store(exp_avg_sq + own, second, random_y, mask)
    if compensation is not None:
        nearest = _nearest(value)
        tl.store(param + own, nearest, mask=mask)
        store(compensation + own, value - nearest.to(tl.float32), random_z, mask)
    else:
        store(param + own, value, random_z, mask)


@triton.jit
def _dequantised(code, scale, value, own, block, mask):  # type: ignore[no-untyped-def]
    """As `blockwise.dequantise`, of blocks (rows, 256)."""
    return tl.load(value + tl.load(code + own, mask, 0).to(tl.int32)) * tl.load(scale + block, mask, 0.0)


@triton.jit
def _store_quantised(code, scale, values, border, first, own, block, mask):  # type: ignore[no-untyped-def]
    """As `blockwise.quantise`, of blocks (rows, 256)."""
    high, low = tl.max(values, axis=1, keep_dims=True), tl.min(values, axis=1, keep_dims=True)
    extreme = tl.where(high >= -low, high, low)
    shares = tl.div_rn(values, tl.broadcast_to(tl.where(extreme == 0, 1.0, extreme), values.shape))
    lowest = tl.load(first + (shares.to(tl.uint32, bitcast=True) >> 16)).to(tl.int32)
    tl.store(code + own, (lowest + (shares > tl.load(border + lowest)).to(tl.int32)).to(tl.uint8), mask=mask)
    tl.store(scale + block, extreme, mask=mask)


@triton.jit(do_not_specialize=MOVING)  # type: ignore[untyped-decorator]
def _adamw8bit_kernel(  # type: ignore[no-untyped-def]
    param, grad, exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale,
    signed_value, signed_border, signed_first, value, border, first, finite, count, start, x0, y0, z0,
    beta1, rest1, beta2, rest2, decay, step_size, eps, size: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * (size // _BLOCK) + tl.arange(0, size // _BLOCK))[:, None]
    own = block * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    whole = block * _BLOCK < count
    if finite is not None:
        whole = tl.where(tl.load(finite), whole, False)
    mask = tl.broadcast_to(whole, own.shape)
    old, gradient = tl.load(param + own, mask, 0.0).to(tl.float32), tl.load(grad + own, mask, 0.0).to(tl.float32)
    exp_avg = _dequantised(exp_avg_code, exp_avg_scale, signed_value, own, block, whole)
    exp_avg_sq = _dequantised(exp_avg_sq_code, exp_avg_sq_scale, value, own, block, whole)
    new, exp_avg, exp_avg_sq = _advance(old, gradient, exp_avg, exp_avg_sq, beta1, rest1, beta2, rest2, decay, step_size, eps)
    _, _, random = drawn(own + start, x0, y0, z0)
    store(param + own, new, random, mask)
    _store_quantised(exp_avg_code, exp_avg_scale, exp_avg, signed_border, signed_first, own, block, whole)
    _store_quantised(exp_avg_sq_code, exp_avg_sq_scale, exp_avg_sq, border, first, own, block, whole)


def adamw_(
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor | None = None,
    *,
    key: Key,
    start: int = 0,
    finite: Tensor | None = None,
    **settings: Any,
) -> None:
    """As `adamw_bf16.adamw_`. Raises ValueError for a tensor that is not contiguous."""
    tensors = (param, grad, exp_avg, exp_avg_sq, compensation)
    check_contiguous(tensors)
    places = (param.numel(), start, *key_constants(key))
    with torch.cuda.device_of(param):  # type: ignore[no-untyped-call]
        _adamw_kernel[(triton.cdiv(param.numel(), ELEMENTS),)](
            *tensors, finite, *places, *coefficients(**settings), size=ELEMENTS, enable_fp_fusion=False
        )


def adamw8bit_(
    param: Tensor,
    grad: Tensor,
    state: State,
    piece: slice,
    *,
    key: Key,
    start: int = 0,
    finite: Tensor | None = None,
    **settings: Any,
) -> None:
    """As `adamw8bit.adamw8bit_`. Raises ValueError for a tensor that is not contiguous."""
    blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
    moments = [
        state[f"{name}_{part}"][piece if part == "code" else blocks] for name in ("exp_avg", "exp_avg_sq") for part in ("code", "scale")
    ]
    tensors = (param[piece], grad[piece], *moments)
    check_contiguous(tensors)
    books = (*codebook(True, param.device), *codebook(False, param.device))
    places = (tensors[0].numel(), start + piece.start, *key_constants(key))
    with torch.cuda.device_of(param):  # type: ignore[no-untyped-call]
        _adamw8bit_kernel[(triton.cdiv(places[0], ELEMENTS),)](
            *tensors, *books, finite, *places, *coefficients(**settings), size=ELEMENTS, enable_fp_fusion=False
        )


def check_contiguous(tensors: Sequence[Tensor | None]) -> None:
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("a kernel steps contiguous tensors only")
