"""AdamW with moments of 8 bits: 2 bytes of state per weight where float32 takes 8.

Moments are kept in blocks of 256 as a scale and codes for a map of 256 values that are dense near zero (arXiv 2110.02861, sections 2
and 3). Each step takes them out, does its math in float32 and puts them back. Small tensors, which norms and biases mostly are, keep
float32 moments: they are 0.04 % of SDXL's UNet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquatint.optim.adamw_bf16 import ADAMW_SETTINGS, Kernel, adamw, adamw_tensors_, has_kernels
from aquatint.optim.flat import join, pieces, spread_
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, write_
from aquatint.optim.sizes import BLOCK, is_quantised
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

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


class AdamW8bit(TensorwiseOptimizer):
    """AdamW over bfloat16 (stochastically rounded) or float32 weights with 8-bit moments.

    `seed` keys the rounding. It is part of the parameter groups, and so of the state dict.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        kernel: Kernel = "auto",
        seed: int,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        self.kernel = kernel

    def kind(self, param: Tensor) -> Hashable:
        return id(param) if is_quantised(param.shape) else super().kind(param)

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        state: State = {}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zeros = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            if is_quantised(param.shape):
                state[f"{name}_code"], state[f"{name}_scale"] = quantise(zeros, signed=signed)
            else:
                state[name] = zeros.view(param.shape)
        return state

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        settings = {"step": step, "key": self.key(unit, step), "finite": finite, **{name: unit.group[name] for name in ADAMW_SETTINGS}}
        if not is_quantised(params[0].shape):
            moments = ([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))
            adamw_tensors_([params, *moments], self.kernel, **settings)
            return
        update = adamw8bit_
        if self.kernel == "auto" and has_kernels(params[0].device):
            from aquatint.optim import kernels

            update = kernels.adamw8bit_
        param, grad = join(params), join([param.grad for param in params if param.grad is not None])
        for piece in pieces(grad):
            update(param, grad, self.state[params[0]], piece, **settings)
        spread_(param, params)


def adamw8bit_(
    param: Tensor,
    grad: Tensor,
    state: State,
    piece: slice,
    *,
    key: Key,
    finite: Tensor | None = None,
    **settings: Any,
) -> None:
    """One step of a piece, a multiple of 256, of a weight and its quantised state, in place, if `finite`.

    The step itself sees moments not rounded.
    """
    blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
    parts = {name: state[name][piece if name.endswith("code") else blocks] for name in state if name != "step"}
    exp_avg = dequantise(parts["exp_avg_code"], parts["exp_avg_scale"], signed=True)
    exp_avg_sq = dequantise(parts["exp_avg_sq_code"], parts["exp_avg_sq_scale"], signed=False)
    value, exp_avg, exp_avg_sq = adamw(param[piece], grad[piece], exp_avg, exp_avg_sq, **settings)
    copy_stochastic_(param[piece], value, draw_for(param[piece], key, piece.start)[-1], finite)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        code, scale = quantise(moment, signed=name == "exp_avg")
        write_(parts[f"{name}_code"], code, finite)
        write_(parts[f"{name}_scale"], scale, finite)
