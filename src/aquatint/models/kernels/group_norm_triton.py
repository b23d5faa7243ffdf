"""`group_norm` as Triton kernels. Importing this module needs Triton.

Each function takes and gives what the one of its name there does. Sums are taken tile by tile, so their last bits differ from those
of plain torch. A tile is a few places of some neighbouring channels, and so what it reads lies together, however wide a group is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquatint.models.kernels.precision import FUSED

PLACES, CHANNELS = 64, 64  # of a tile
TILES = 64  # whose moments are summed at once: those of a large picture all at once are code that takes a minute to compile
_PLACES, _CHANNELS = tl.constexpr(PLACES), tl.constexpr(CHANNELS)


@triton.jit
def _tile(places, channels):  # type: ignore[no-untyped-def]
    """Of this program: its picture, its channels (1, CHANNELS), its elements from the picture's first on, and which of them there are."""
    place = tl.program_id(0) * _PLACES + tl.arange(0, _PLACES)[:, None]
    channel = tl.program_id(1) * _CHANNELS + tl.arange(0, _CHANNELS)[None, :]
    picture = tl.program_id(2).to(tl.int64)
    return picture, channel, picture * places * channels + place * channels + channel, (place < places) & (channel < channels)


@triton.jit
def _shifted(x, shift, picture, channel, own, mask, channels):  # type: ignore[no-untyped-def]
    value = tl.load(x + own, mask, 0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + picture * channels + channel, channel < channels, 0.0).to(tl.float32)
    return value


@triton.jit
def _of_group(statistic, picture, channel, channels, groups):  # type: ignore[no-untyped-def]
    return tl.load(statistic + picture * groups + channel // (channels // groups), channel < channels, 0.0)


@triton.jit
def _moments_kernel(x, shift, moments, places, channels):  # type: ignore[no-untyped-def]
    """Of each channel in a tile: its mean and its sum of squares around it."""
    picture, channel, own, mask = _tile(places, channels)
    value = _shifted(x, shift, picture, channel, own, mask, channels)
    count = tl.minimum(places - tl.program_id(0) * _PLACES, _PLACES)
    mean = tl.sum(tl.where(mask, value, 0.0), axis=0, keep_dims=True) / count
    apart = tl.where(mask, value - mean, 0.0)
    there = ((picture * tl.num_programs(0) + tl.program_id(0)) * 2) * channels + channel
    tl.store(moments + there, mean, channel < channels)
    tl.store(moments + there + channels, tl.sum(apart * apart, axis=0, keep_dims=True), channel < channels)


@triton.jit
def _of_tiles(first, places, channels, picture, group, own_width, tiles: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of some tiles from `first` on: how many places each has, where the moments of a group's channels lie, and which of them there are."""
    tile, inside = first + tl.arange(0, tiles)[:, None], tl.arange(0, width)[None, :]
    count = tl.clamp((places - tile * _PLACES).to(tl.float32), 0.0, _PLACES)
    there = (picture * tl.cdiv(places, _PLACES) + tile) * 2 * channels + group * own_width + inside
    return count, there, (tile * _PLACES < places) & (inside < own_width)


@triton.jit
def _statistics_kernel(moments, mean, rstd, places, channels, groups, eps, tiles: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The moments of a group from those of its channels, some tiles at a time, by the formula of Chan, Golub and LeVeque (1979)."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own_width = channels // groups
    whole = (places * own_width).to(tl.float32)
    total = tl.zeros((tiles, width), tl.float32)
    for first in range(0, tl.cdiv(places, _PLACES), tiles):
        count, there, mask = _of_tiles(first, places, channels, picture, group, own_width, tiles, width)
        total += tl.load(moments + there, mask, 0.0) * count
    centre = tl.sum(tl.sum(total, axis=1), axis=0) / whole
    squares = tl.zeros((tiles, width), tl.float32)
    for first in range(0, tl.cdiv(places, _PLACES), tiles):
        count, there, mask = _of_tiles(first, places, channels, picture, group, own_width, tiles, width)
        apart = tl.where(mask, tl.load(moments + there, mask, 0.0) - centre, 0.0)
        squares += tl.load(moments + there + channels, mask, 0.0) + count * apart * apart
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / whole
    tl.store(mean + picture * groups + group, centre)
    tl.store(rstd + picture * groups + group, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def _normalise_kernel(x, shift, weight, bias, mean, rstd, result, places, channels, groups, silu: tl.constexpr):  # type: ignore[no-untyped-def]
    picture, channel, own, mask = _tile(places, channels)
    value = _shifted(x, shift, picture, channel, own, mask, channels)
    centre, scale = _of_group(mean, picture, channel, channels, groups), _of_group(rstd, picture, channel, channels, groups)
    there = channel < channels
    factor, addend = tl.load(weight + channel, there, 0.0).to(tl.float32), tl.load(bias + channel, there, 0.0).to(tl.float32)
    value = (value - centre) * scale * factor + addend
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(result + own, value.to(result.dtype.element_ty), mask)


@triton.jit
def _backwards(grad, x, shift, weight, bias, mean, rstd, picture, channel, own, mask, channels, groups, silu):  # type: ignore[no-untyped-def]
    """As `group_norm.backwards`, and the weights; what is not there is 0."""
    value = _shifted(x, shift, picture, channel, own, mask, channels)
    centre, scale = _of_group(mean, picture, channel, channels, groups), _of_group(rstd, picture, channel, channels, groups)
    normed = tl.where(mask, (value - centre) * scale, 0.0)
    before = tl.load(grad + own, mask, 0.0).to(tl.float32)
    factor = tl.load(weight + channel, channel < channels, 0.0).to(tl.float32)
    if silu:
        scaled = normed * factor + tl.load(bias + channel, channel < channels, 0.0).to(tl.float32)
        gate = tl.sigmoid(scaled)
        before = before * (gate * (1 + scaled * (1 - gate)))
    return normed, before, factor, scale


@triton.jit
def _sums_kernel(grad, x, shift, weight, bias, mean, rstd, sums, places, channels, groups, silu: tl.constexpr):  # type: ignore[no-untyped-def]
    """The three sums of each channel in a tile."""
    picture, channel, own, mask = _tile(places, channels)
    normed, before, _, _ = _backwards(grad, x, shift, weight, bias, mean, rstd, picture, channel, own, mask, channels, groups, silu)
    tiles, there = tl.num_programs(0), channel < channels
    first = sums + (picture * tiles + tl.program_id(0)) * channels + channel
    plane = tl.num_programs(2).to(tl.int64) * tiles * channels
    tl.store(first, tl.sum(before, axis=0, keep_dims=True), there)
    tl.store(first + plane, tl.sum(before * normed, axis=0, keep_dims=True), there)
    tl.store(first + 2 * plane, tl.sum(normed, axis=0, keep_dims=True), there)


@triton.jit
def _input_gradient_kernel(  # type: ignore[no-untyped-def]
    grad, x, shift, weight, bias, mean, rstd, means, result, places, channels, groups, silu: tl.constexpr
):  # fmt: skip
    picture, channel, own, mask = _tile(places, channels)
    normed, before, factor, scale = _backwards(
        grad, x, shift, weight, bias, mean, rstd, picture, channel, own, mask, channels, groups, silu
    )
    first = _of_group(means, picture, channel, channels, groups)
    second = _of_group(means + tl.num_programs(2) * groups, picture, channel, channels, groups)
    tl.store(result + own, (scale * (before * factor - (first + normed * second))).to(result.dtype.element_ty), mask)


def normalise(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_norm.normalise`."""
    grid, places, channels = _grid(x)
    moments = x.new_empty(x.shape[0], grid[0], 2, channels, dtype=torch.float32)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    result = torch.empty_like(x, dtype=dtype)
    shift = None if shift is None else shift.contiguous()
    widths = {"tiles": min(TILES, triton.next_power_of_2(grid[0])), "width": triton.next_power_of_2(channels // groups)}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _moments_kernel[grid](x, shift, moments, places, channels, **FUSED)
        _statistics_kernel[(groups, x.shape[0])](moments, mean, rstd, places, channels, groups, eps, **widths, **FUSED)
        _normalise_kernel[grid](x, shift, weight, bias, mean, rstd, result, places, channels, groups, silu, **FUSED)
    return result, mean, rstd


def gradient_sums(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """As `group_norm.gradient_sums`."""
    grid, places, channels = _grid(x)
    sums = x.new_empty(3, x.shape[0], grid[0], channels, dtype=torch.float32)
    shift = None if shift is None else shift.contiguous()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _sums_kernel[grid](grad, x, shift, weight, bias, mean, rstd, sums, places, channels, mean.shape[1], silu, **FUSED)
    return sums.sum(dim=2)


def input_gradient(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, means: Tensor, silu: bool
) -> Tensor:
    """As `group_norm.input_gradient`."""
    grid, places, channels = _grid(x)
    result = torch.empty_like(x)
    shift = None if shift is None else shift.contiguous()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _input_gradient_kernel[grid](
            grad, x, shift, weight, bias, mean, rstd, means, result, places, channels, mean.shape[1], silu, **FUSED
        )
    return result


def _grid(x: Tensor) -> tuple[tuple[int, int, int], int, int]:
    """Programs by tile, and how many places and channels a picture has. Raises ValueError if its channels do not lie last."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("a kernel takes pictures whose channels lie last")
    places, channels = x.shape[2] * x.shape[3], x.shape[1]
    return (triton.cdiv(places, PLACES), triton.cdiv(channels, CHANNELS), x.shape[0]), places, channels
