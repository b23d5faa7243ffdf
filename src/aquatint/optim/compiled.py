"""An optimizer's update as one pass over memory on a CPU: plain torch, made into vector instructions by torch.compile and a C++ compiler.

Each function does what the one of its name in `adamw_bf16` or `adamw8bit` does, bit for bit. What is written otherwise is so because the
compiler would make scalar code of it: two bfloat16 neighbours are one int32, out of which a shift and a mask make two float32, and for
which one hash has both random numbers; 8-bit codes become values by arithmetic. One compilation is good for all lengths, settings and keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from shutil import which
from typing import Any

import torch
from torch import Tensor

from aquatint.optim.blockwise import DECADES, KEYS, code_table
from aquatint.optim.formula import Coefficients, advance, coefficients
from aquatint.optim.rounding import LOW_BITS, MULTIPLIER, Key, key_constants
from aquatint.optim.sizes import BLOCK
from aquatint.optim.tensorwise import State

LEAST = 1 << 14  # weights: to call a compiled function takes as long as so many do in plain torch
PIECE = 1 << 19  # weights with moments of 8 bits: what lies between the passes of their update stays in the caches
LOWER, UPPER, SIGN, MAGNITUDE = LOW_BITS - 1, -LOW_BITS, -(1 << 31), (1 << 31) - 1  # masks
LARGEST_BITS, INFINITY_BITS, NAN_BITS = 0x7F7F0000, 0x7F800000, 0x7FC00000  # as float32; the first is bfloat16's largest number
EXPONENT_BIAS, MANTISSA_BITS = 127, 23


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile calls."""
    return which(os.environ.get("CXX", "g++")) is not None


def adamw_(
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor | None = None,
    *,
    key: Key,
    finite: Tensor | None = None,
    **settings: Any,
) -> int:
    """As `adamw_bf16.adamw_`, of the first weights of vectors. Returns of how many: of none if they are few or float32, or it is not sure
    whether there is to be a step.
    """
    tensors = [grad, param, exp_avg, exp_avg_sq, *([] if compensation is None else [compensation])]
    count = param.numel() - param.numel() % 2
    if finite is not None or count < LEAST or not all(_is_in_pairs(tensor) for tensor in tensors):
        return 0
    _compiled(_adamw_pairs)(*_numbers(key, settings), *(_of_any_length(tensor[:count].view(torch.int32)) for tensor in tensors))
    return count


def adamw8bit_(param: Tensor, grad: Tensor, state: State, *, key: Key, finite: Tensor | None = None, **settings: Any) -> int:
    """As `adamw8bit.adamw8bit_`, of whole vectors. Returns of how many weights: of none if they are few, or as `adamw_` does."""
    if finite is not None or param.numel() < LEAST:
        return 0
    books = [code_table(signed, param.device) for signed in (True, False)]
    blocks = [param.view(-1, BLOCK), grad.view(-1, BLOCK)]
    for name in ("exp_avg", "exp_avg_sq"):
        blocks += [state[f"{name}_code"].view(-1, BLOCK), state[f"{name}_scale"]]
    start = 0
    for piece in zip(*(tensor.tensor_split(-(-param.numel() // PIECE)) for tensor in blocks), strict=True):
        _compiled(_adamw_blocks)(*_numbers(key, settings, start // 2), *books, *(_of_any_length(tensor) for tensor in piece))
        start += piece[0].numel()
    return param.numel()


def _is_in_pairs(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.storage_offset() % 2 == 0


@cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(update, fullgraph=True)


def _of_any_length(tensor: Tensor) -> Tensor:
    """The same memory, marked so that nothing is compiled again for another length, nor for a view of something else."""
    plain = tensor.detach()
    torch._dynamo.mark_dynamic(plain, 0)
    return plain


def _numbers(key: Key, settings: dict[str, Any], first: int = 0) -> tuple[Tensor, Tensor]:
    """What changes from step to step: the coefficients, float32, and the first pair of places with the key's constants, int32."""
    return torch.tensor(coefficients(**settings), dtype=torch.float32), torch.tensor([first, *key_constants(key)], dtype=torch.int32)


def _adamw_pairs(
    numbers: Tensor, places: Tensor, grad: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, compensation: Tensor | None = None
) -> None:
    """All vectors are pairs of bfloat16 in int32."""
    c = Coefficients(*numbers.unbind())
    words = _words(torch.arange(param.shape[0], dtype=torch.int32) + places[0], places)
    news = []
    for half in (_lower, _upper):
        old = half(param) if compensation is None else half(param) + half(compensation)
        news.append(advance(old, half(grad), half(exp_avg), half(exp_avg_sq), c))
    params, firsts, seconds = zip(*news, strict=True)
    exp_avg.copy_(_rounded(firsts, words[0]))
    exp_avg_sq.copy_(_rounded(seconds, words[1]))
    if compensation is None:
        param.copy_(_rounded(params, words[2]))
        return
    nearest = [_nearest(value) for value in params]
    rests = [value - bits.view(torch.float32) for value, bits in zip(params, nearest, strict=True)]
    param.copy_(_pair(*nearest))
    compensation.copy_(_rounded(rests, words[2]))


def _adamw_blocks(
    numbers: Tensor, places: Tensor, signed: Tensor, unsigned: Tensor, param: Tensor, grad: Tensor,
    exp_avg_code: Tensor, exp_avg_scale: Tensor, exp_avg_sq_code: Tensor, exp_avg_sq_scale: Tensor,
) -> None:  # fmt: skip
    """Weights, gradients and codes are (blocks, 256), scales (blocks,); `signed` and `unsigned` are the tables that codes are found in."""
    exp_avg = _value(exp_avg_code, signed=True) * exp_avg_scale.unsqueeze(1)
    exp_avg_sq = _value(exp_avg_sq_code, signed=False) * exp_avg_sq_scale.unsqueeze(1)
    value, exp_avg, exp_avg_sq = advance(param, grad, exp_avg, exp_avg_sq, Coefficients(*numbers.unbind()))
    if param.dtype == torch.bfloat16:
        block = torch.arange(param.shape[0], dtype=torch.int32).unsqueeze(1) * (BLOCK // 2)
        own = torch.arange(BLOCK, dtype=torch.int32)
        word = _words(block + (own >> 1) + places[0], places)[2]
        value = ((_bits(value) + (word >> ((own & 1) << 4) & LOWER)) & UPPER).view(torch.float32)
    param.copy_(value)
    _quantise_(exp_avg, exp_avg_code, exp_avg_scale, signed)
    _quantise_(exp_avg_sq, exp_avg_sq_code, exp_avg_sq_scale, unsigned)


def _words(place: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `rounding.draw_bits` draws for pairs of neighbours: the first one's number is in the lower half of each int32."""
    _, x0, y0, z0 = places.unbind()
    x = place * MULTIPLIER + x0
    y = x * z0 + y0
    z = x * y + z0
    x, y, z = _folded(x), _folded(y), _folded(z)
    x = x + y * z
    y = y + z * x
    z = z + x * y
    return _folded(x), _folded(y), _folded(z)


def _folded(word: Tensor) -> Tensor:
    return word ^ (word >> 16 & LOWER)


def _lower(pair: Tensor) -> Tensor:
    """The first of two bfloat16 neighbours, float32."""
    return (pair << 16).view(torch.float32)


def _upper(pair: Tensor) -> Tensor:
    """The second one."""
    return (pair & UPPER).view(torch.float32)


def _pair(lower: Tensor, upper: Tensor) -> Tensor:
    """Two neighbours from the bits of the float32 that they are the upper halves of."""
    return (lower >> 16 & LOWER) | (upper & UPPER)


def _rounded(values: tuple[Tensor, ...] | list[Tensor], word: Tensor) -> Tensor:
    """Two neighbours, rounded as `rounding.round_stochastic` does."""
    lower, upper = values
    return _pair(_bits(lower) + (word & LOWER), _bits(upper) + (word >> 16 & LOWER))


def _bits(value: Tensor) -> Tensor:
    """Of a float32, at most bfloat16's largest number in magnitude, or of a NaN: such that a number of 16 bits can be added."""
    bits = value.view(torch.int32)
    magnitude = bits & MAGNITUDE
    return (bits & (_is_nan(magnitude) & UPPER | SIGN)) | magnitude.clamp(max=LARGEST_BITS)


def _nearest(value: Tensor) -> Tensor:
    """Bits of the nearest bfloat16, the even one of two."""
    bits = value.view(torch.int32)
    return (bits + (LOWER >> 1) + (bits >> 16 & 1)) & UPPER | (_is_nan(bits & MAGNITUDE) & NAN_BITS)


def _is_nan(magnitude: Tensor) -> Tensor:
    """All bits set where these are those of a NaN, none elsewhere."""
    return (INFINITY_BITS - magnitude) >> 31


def _value(code: Tensor, *, signed: bool) -> Tensor:
    """What a code stands for in `blockwise.dynamic_map`: the quotient of two whole numbers.

    With n counted from zero, the first one being 1, and 2^d the largest power of two in n, that is (18 n + 9 - 16 2^d) 5^d / (20 10^6), but
    at most 1. In the unsigned map n starts at 2, and the divisor is ten times as large.
    """
    offset = code.int() - (BLOCK // 2 - 1) if signed else code.int()
    place = offset.abs() if signed else offset + 1
    bits = place.float().view(torch.int32)
    decade = (bits >> MANTISSA_BITS) - EXPONENT_BIAS
    power = (bits & INFINITY_BITS).view(torch.float32).int()
    left = (DECADES if signed else DECADES + 1) - decade
    divisor = ((left & 1) * 4 + 1) * ((left & 2) * 12 + 1) * ((left & 4) * 156 + 1) * (BLOCK if signed else 2 * BLOCK)
    dividend = torch.minimum(place * 18 + 9 - power * 16, divisor) & (-(place if signed else offset) >> 31)
    share = dividend.float() / divisor.float()
    return (share.view(torch.int32) | (offset & SIGN)).view(torch.float32) if signed else share


def _quantise_(values: Tensor, code: Tensor, scale: Tensor, table: Tensor) -> None:
    """As `blockwise.quantise`, of (blocks, 256) and by a `blockwise.code_table`."""
    low, high = values.amin(dim=1), values.amax(dim=1)
    extreme = torch.where(high >= -low, high, low)
    code.copy_(_codes(values / torch.where(extreme == 0, 1.0, extreme).unsqueeze(1), table))
    scale.copy_(extreme)


def _codes(shares: Tensor, table: Tensor) -> Tensor:
    bits = shares.view(torch.int32)
    entry = table[bits >> 16 & KEYS - 1]
    is_above = (entry & KEYS - 1) - ((bits ^ bits >> 31) & KEYS - 1) >> 31  # -1 or 0
    return (entry >> 16) - is_above
