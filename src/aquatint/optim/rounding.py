"""Stochastic rounding: float32 results kept in bfloat16 without a bias.

bfloat16 has 8 bits of precision. A weight of 1 moves by 0.004 or not at all, so rounding to the nearest loses every small update;
a moment that decays by 0.999 never decays. Rounding up with probability equal to the remainder keeps the mean exact.

The random bits are a function of (seed, unit, step, place in the unit). So nothing has to be saved, and a CPU, a GPU and a kernel that
does a whole update at once round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquatint.utils.seeds import words_of

Key = tuple[int, int]

LARGEST: float = torch.finfo(torch.bfloat16).max
LOW_BITS = 1 << 16  # float32 has this many values per bfloat16 step: the upper half of its bits is a bfloat16
NAN_BITS = 0x7FFF0000  # of a NaN that 16 bits can be added to: those of a GPU have all bits set, and would become a zero
MULTIPLIER, INCREMENT = 1664525, 1013904223  # of the generator's first round


def rounding_key(seed: int, index: int, step: int) -> Key:
    """What the random bits for step `step` of the weights with this index are drawn from: two words of 32 bits."""
    return words_of(seed, f"rounding/{index}/{step}")


def key_constants(key: Key) -> tuple[int, int, int]:
    """What all places share in the generator's first round: added to the first word, and the other two before it, as int32."""
    y, z = (MULTIPLIER * word + INCREMENT for word in key)
    return _wrapped(INCREMENT + y * z), _wrapped(y), _wrapped(z)


def draw_bits(key: Key, start: int, count: int, device: torch.device, *, rows: int = 3) -> Tensor:
    """Numbers (3, count) uniform in 0..65535, int32, for `count` places from `start` on; or only the last `rows` of the three.

    pcg3d of two neighbours' place and the key (Jarzynski & Olano 2020, "Hash Functions for GPU Rendering", JCGT 9(3)): three
    words of 32 bits, of which each neighbour has a half. Lower halves are the weaker ones, so that upper ones are laid over them.
    """
    first, last = start // 2, (start + count + 1) // 2
    x0, y0, z0 = key_constants(key)
    words = torch.empty(3, last - first, dtype=torch.int32, device=device)
    x, y, z = words
    torch.arange(first, last, out=x)
    x.mul_(MULTIPLIER).add_(x0)
    torch.mul(x, z0, out=y).add_(y0)
    torch.mul(x, y, out=z).add_(z0)
    words ^= _upper_half(words)
    x.addcmul_(y, z)
    y.addcmul_(z, x)
    z.addcmul_(x, y)
    words = words[-rows:]
    words ^= _upper_half(words)
    return words.view(torch.uint16)[:, start % 2 :][:, :count].to(torch.int32)


def draw_for(target: Tensor, key: Key, start: int = 0, *, rows: int = 3) -> Tensor:
    """`draw_bits` (3, n) for the n elements of `target`, the first of which is at place `start`; none (3, 0) if it is float32."""
    if target.dtype != torch.bfloat16:
        return torch.empty(rows, 0, dtype=torch.int32, device=target.device)
    return draw_bits(key, start, target.numel(), target.device, rows=rows)


def draw_rows(target: Tensor, key: Key, first: int = 0) -> Tensor:
    """Numbers for a bfloat16 matrix, like itself, of whose whole its rows are those from `first` on; none if it is float32.

    The three of `draw_bits` for one place are for three weights of a row, a third of it apart. A vector (1, n) is taken as (n, 1).
    """
    if target.dtype != torch.bfloat16:
        return torch.empty(0, dtype=torch.int32, device=target.device)
    rows, width = target.shape
    third = -(-width // 3)
    drawn = draw_bits(key, first * third, rows * third, target.device)
    return drawn.view(3, rows, third).transpose(0, 1).reshape(rows, 3 * third)[:, :width]


def round_stochastic(value: Tensor, random_bits: Tensor) -> Tensor:
    """`value` (float32) as bfloat16: up or down with probabilities that keep the mean, given int32 bits uniform in 0..65535.

    Values that bfloat16 can hold come back as they are, and NaN as NaN. What lies beyond its largest number, infinity too, becomes that.
    (arXiv 2010.06192)
    """
    return _rounded(value, random_bits).to(torch.bfloat16)


def exact(values: Tensor) -> Tensor:
    """A float32 copy, to be written to."""
    return values.to(torch.float32, copy=True)


def write_(target: Tensor, value: Tensor, finite: Tensor | None = None) -> None:
    """Copy `value` into `target`; where the bool scalar `finite` is False, leave every bit of it as it is.

    It is the device that decides, in the pass that writes: the host need not know.
    """
    if finite is None:
        target.copy_(value)
    else:
        torch.where(finite, value.to(target.dtype), target, out=target)


def copy_stochastic_(target: Tensor, source: Tensor, random_bits: Tensor, finite: Tensor | None = None) -> None:
    """Write float32 `source` into `target` as `write_` does: stochastically rounded if it is bfloat16, as it is if it is float32.

    Raises ValueError for other dtypes of `target`.
    """
    if target.dtype == torch.float32:
        write_(target, source, finite)
    elif target.dtype == torch.bfloat16:
        write_(target, _rounded(source.contiguous(), random_bits.view(source.shape)), finite)
    else:
        raise ValueError(f"weights must be float32 or bfloat16, got {target.dtype}")


def _rounded(value: Tensor, random_bits: Tensor) -> Tensor:
    """As `round_stochastic`, still float32."""
    bits = value.clamp(-LARGEST, LARGEST).view(torch.int32).clamp_(max=NAN_BITS)
    return bits.add_(random_bits).bitwise_and_(-LOW_BITS).view(torch.float32)


def _upper_half(words: Tensor) -> Tensor:
    """The upper 16 of each int32's bits, as a number in 0..65535."""
    return (words >> 16).bitwise_and_(LOW_BITS - 1)


def _wrapped(number: int) -> int:
    """The int32 with an integer's lower 32 bits."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
