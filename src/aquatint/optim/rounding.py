"""Stochastic rounding: float32 results kept in bfloat16 without a bias.

bfloat16 has 8 bits of precision. A weight of 1 moves by 0.004 or not at all, so rounding to the nearest loses every small update;
a moment that decays by 0.999 never decays. Rounding up with probability equal to the remainder keeps the mean exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquatint.utils.seeds import seed_of

LOW_BITS = 1 << 16  # float32 has this many values per bfloat16 step: the upper half of its bits is a bfloat16
MAGNITUDE = 0x7FFFFFFF  # a float32's bits but for the sign: they are ordered as the numbers are
LARGEST_BITS = 0x7F7F0000  # of bfloat16's largest number
DRAWS_PER_WORD = 4  # one 64-bit random number rounds so many values


def rounding_generator(seed: int, index: int, step: int, device: torch.device) -> torch.Generator:
    """The random bits for step `step` of the weights with this index: a function of the three, so nothing has to be saved."""
    return torch.Generator(device).manual_seed(seed_of(seed, f"rounding/{index}", step))


def draw_bits(count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers uniform in 0..65535, int32."""
    words = torch.empty(-(-count // DRAWS_PER_WORD), dtype=torch.int64, device=generator.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.uint16)[:count].to(torch.int32)


def round_stochastic(value: Tensor, random_bits: Tensor) -> Tensor:
    """`value` (float32) as bfloat16: up or down with probabilities that keep the mean, given int32 bits uniform in 0..65535.

    Values that bfloat16 can hold come back as they are, among them infinity and NaN. What lies beyond its largest number is
    truncated to it. (arXiv 2010.06192)
    """
    bits = value.view(torch.int32)
    room = (LARGEST_BITS - bits.bitwise_and(MAGNITUDE)).clamp_(min=0)  # up to there the sum stays finite, and rounds the same
    bits = torch.minimum(random_bits, room).add_(bits).bitwise_and_(-LOW_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)


def copy_stochastic_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write float32 `source` into `target` in place: stochastically rounded if it is bfloat16, as it is if it is float32.

    Raises ValueError for other dtypes of `target`.
    """
    if target.dtype == torch.float32:
        target.copy_(source)
    elif target.dtype == torch.bfloat16:
        source = source.contiguous()
        target.copy_(round_stochastic(source, draw_bits(source.numel(), generator).view(source.shape)))
    else:
        raise ValueError(f"weights must be float32 or bfloat16, got {target.dtype}")
