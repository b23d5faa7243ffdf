"""Numbers of 8 bits in blocks of 256 that share a scale: codes for a map of 256 values, dense near zero (arXiv 2110.02861, section 2)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from aquatint.optim.sizes import BLOCK

DECADES = 7  # of the map, from 1e-7 to 1
KEYS = 1 << 16  # a float32's upper 16 bits: no two borders of the map share them


class Codebook(NamedTuple):
    """A map of 256 values in rising order. `border` c is halfway between values c and c + 1, the last one infinite.

    `first` (65536,) is the code of the lowest float32 with these upper 16 bits, uint8.
    """

    value: Tensor
    border: Tensor
    first: Tensor


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values, float32, of which the largest is 1; each decade has twice as many as the one below (arXiv 2110.02861, section 1.3).

    Signed from -0.993, for first moments; unsigned from 0, with twice as many above it, for second moments.
    """
    positive = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - DECADES))
    values = torch.cat(positive)
    zero_and_one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([values, zero_and_one, *([-values] if signed else [])]).sort().values.float()


@cache
def codebook(signed: bool, device: torch.device) -> Codebook:
    """The map with what is needed to find a value's nearest code in two look-ups."""
    value = dynamic_map(signed=signed)
    border = torch.cat([(value[1:] + value[:-1]) / 2, torch.tensor([torch.inf])])
    upper = torch.arange(KEYS, dtype=torch.int64)
    lowest = torch.where(upper >= KEYS // 2, upper * KEYS + KEYS - 1, upper * KEYS)  # of negative numbers, larger bits are lower
    floats = torch.where(lowest >= 1 << 31, lowest - (1 << 32), lowest).to(torch.int32).view(torch.float32)
    first = torch.bucketize(floats.nan_to_num(0.0), border[:-1], out_int32=True)
    return Codebook(value.to(device), border.to(device), first.to(torch.uint8).to(device))


@cache
def code_table(signed: bool, device: torch.device) -> Tensor:
    """A float32's code in one look-up by its upper 16 bits: int32 (65536,), whose upper half is the code of the lowest such number.

    The lower half is what the lower 16 bits must be above for the next code; those of a negative number count downwards.
    """
    book = codebook(signed, torch.device("cpu"))
    keys = torch.arange(KEYS, dtype=torch.int32)
    border = book.border[book.first.int()].view(torch.int32)
    above = ((border ^ (border >> 31)) & (KEYS - 1)).where((border >> 16) & (KEYS - 1) == keys, KEYS - 1)
    return ((book.first.int() << 16) | above).to(device)


def quantise(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and scales (n / 256,) float32 of a float32 vector.

    A block's scale is its value of largest magnitude, with its sign, so that this value is kept exactly, and quantising twice is
    the same as once.
    """
    book, blocks = codebook(signed, values.device), values.view(-1, BLOCK)
    low, high = blocks.amin(dim=1), blocks.amax(dim=1)  # aminmax is ten times as slow on a CPU
    scale = torch.where(high >= -low, high, low)
    shares = blocks / torch.where(scale == 0, 1.0, scale).unsqueeze(1)
    keys = (shares.view(torch.int32) >> 16).bitwise_and_(KEYS - 1).flatten()
    code = book.first.index_select(0, keys)
    code += shares.flatten() > book.border.index_select(0, code.int())
    return code, scale


def dequantise(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The float32 vector that codes (n,) and scales (n / 256,) stand for."""
    book = codebook(signed, codes.device)
    values = book.value.index_select(0, codes.int()).view(-1, BLOCK)
    return values.mul_(scale.unsqueeze(1)).flatten()
