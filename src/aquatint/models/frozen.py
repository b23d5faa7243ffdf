"""Frozen linear layers in fewer bytes, or with their weight in another place: it is made anew whenever it is needed.

A layer keeps its name and computes what a linear layer with the same weight computes. Nothing of the weight is kept from the forward
pass to the backward pass, so that it can be on the device for a moment only.

`int8` has one scale for each output; `nf4` has 4 bits and a scale for each 64 weights (arXiv 2305.14314, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquatint.models.frozen_shapes import NF4_BLOCK, NF4_PAIRS, Format
from aquatint.models.sdxl.shapes import Shape

INT8_LARGEST = 127  # symmetric: -128 is not used
NF4 = (  # arXiv 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Parts = tuple[Tensor, ...]


def quantise(weight: Tensor, kept: Format, dtype: torch.dtype) -> Parts:
    """What a weight (O, I) is kept as. `own`: itself, as `dtype`. `int8`: codes (O, I) int8, scales (O,) float32.

    `nf4`: codes (O I / 2,) uint8, two weights in each, scales (O I / 64,) float32, and the table (256, 2) of what a byte stands for.
    """
    if kept == "own":
        return (weight.to(dtype),)
    if kept == "int8":
        scale = weight.float().abs().amax(dim=1) / INT8_LARGEST
        shares = weight.float() / torch.where(scale == 0, 1.0, scale).unsqueeze(1)
        return shares.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale
    blocks, values = weight.float().reshape(-1, NF4_BLOCK), torch.tensor(NF4)
    scale = blocks.abs().amax(dim=1)
    shares = (blocks / torch.where(scale == 0, 1.0, scale).unsqueeze(1)).flatten()
    code = torch.bucketize(shares, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    return code[::2] * 16 + code[1::2], scale, torch.cartesian_prod(values, values)


def dequantise(parts: Sequence[Tensor], kept: Format, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that `parts` stand for, as `dtype`; the product with the scale is rounded once."""
    if kept == "own":
        return parts[0]
    weight = torch.empty(shape, dtype=dtype, device=parts[0].device)
    if kept == "int8":
        codes, scale = parts
        return torch.mul(codes, scale.unsqueeze(1), out=weight)
    codes, scale, pairs = parts
    torch.mul(pairs.index_select(0, codes.int()).view(-1, NF4_BLOCK), scale.unsqueeze(1), out=weight.view(-1, NF4_BLOCK))
    return weight


def _room_for(shape: Shape, kept: Format, dtype: torch.dtype) -> Parts:
    """What `quantise` gives for a weight of this shape, not filled."""
    count = prod(shape)
    if kept == "own":
        return (torch.empty(shape, dtype=dtype),)
    if kept == "int8":
        return torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
    return torch.empty(count // 2, dtype=torch.uint8), torch.empty(count // NF4_BLOCK), torch.empty(NF4_PAIRS, 2)


class FrozenLinear(nn.Module):
    """A linear layer that is not trained. `weight` is made at every look at it."""

    def __init__(self, layer: Any, kept: Format, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape: Shape = (layer.out_features, layer.in_features)
        self.kept, self.dtype = kept, dtype
        self.bias = layer.bias
        self._fetch: Callable[[], Parts] | None = None
        for number, part in enumerate(_room_for(self.shape, kept, dtype)):
            self.register_buffer(f"part{number}", part, persistent=False)

    def take(self, weight: Tensor) -> None:
        """Keeps a weight in place of the one before."""
        for part, value in zip(self.parts, quantise(weight, self.kept, self.dtype), strict=True):
            part.copy_(value)

    def lend(self, fetch: Callable[[], Parts]) -> None:
        """From now on, what the weight is kept as comes from `fetch`: it is not moved with the layer, and may change its place."""
        for name, _ in list(self.named_buffers(recurse=False)):
            delattr(self, name)
        self._fetch = fetch

    @property
    def parts(self) -> Parts:
        """What the weight is kept as, where it is to be used."""
        return tuple(self.buffers(recurse=False)) if self._fetch is None else self._fetch()

    @property
    def weight(self) -> Tensor:
        return dequantise(self.parts, self.kept, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        found: Tensor = _Product.apply(x, self.bias, self)
        return found


class _Product(torch.autograd.Function):
    """x W^T + b, for which nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        flat = grad.reshape(-1, grad.shape[-1]).mm(ctx.layer.weight.to(grad.dtype))
        return flat.view(*grad.shape[:-1], flat.shape[-1]), None, None


def freeze_compactly(unet: nn.Module, layers: Iterable[str], kept: Format, dtype: torch.dtype) -> dict[str, Callable[[Tensor], None]]:
    """Replaces linear layers by frozen ones that wait for their weights; returns what takes them, by name."""
    takers: dict[str, Callable[[Tensor], None]] = {}
    for name in layers:
        parent, _, last = name.rpartition(".")
        frozen = FrozenLinear(unet.get_submodule(name), kept, dtype)
        unet.get_submodule(parent).register_module(last, frozen)
        takers[f"{name}.weight"] = frozen.take
    return takers


def weight_shapes(unet: nn.Module) -> dict[str, Shape]:
    """Name -> shape of all weights, those of compact layers too."""
    shapes: dict[str, Shape] = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    return shapes | {f"{name}.weight": module.shape for name, module in unet.named_modules() if isinstance(module, FrozenLinear)}


def halve(unet: nn.Module, names: Iterable[str]) -> None:
    """Makes frozen bfloat16 weights of some, as autocast would at every use of them."""
    for name in names:
        layer, _, last = name.rpartition(".")
        half = unet.get_parameter(name).detach().to(torch.bfloat16)
        setattr(unet.get_submodule(layer), last, nn.Parameter(half, requires_grad=False))
