"""AdamW with moments of 8 bits: 2 bytes of state per weight where float32 takes 8.

Moments are kept in blocks of 256 as a scale and codes for a map of 256 values that are dense near zero (arXiv 2110.02861, sections 2
and 3). Each step takes them out, does its math in float32 and puts them back. Small tensors, which norms and biases mostly are, keep
float32 moments: they are 0.04 % of SDXL's UNet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from aquatint.optim import compiled
from aquatint.optim.adamw_bf16 import ADAMW_SETTINGS, Kernel, adamw_tensors_, chosen_kernel, has_kernels
from aquatint.optim.blockwise import dequantise, quantise
from aquatint.optim.flat import join, pieces, spread_
from aquatint.optim.formula import adamw
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, write_
from aquatint.optim.sharded import local, local_grad, place_of
from aquatint.optim.sizes import BLOCK, is_quantised
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit


class AdamW8bit(TensorwiseOptimizer):
    """AdamW over bfloat16 (stochastically rounded) or float32 weights with 8-bit moments.

    `seed` keys the rounding. It is part of the parameter groups, and so of the state dict. `kernel` is as
    `chosen_kernel` has it.
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
        self.kernel = chosen_kernel(kernel, [param for group in self.param_groups for param in group["params"]])

    def kind(self, param: Tensor) -> Hashable:
        return id(param) if is_quantised(param.shape) else super().kind(param)

    def steps_part(self, param: Tensor) -> bool:
        """If no block of a quantised weight is cut in two."""
        place = place_of(param)
        return not is_quantised(param.shape) or place.group is None or place.most % BLOCK == 0

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        state: State = {}
        part = local(param)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zeros = torch.zeros(part.numel(), dtype=torch.float32, device=part.device)
            if is_quantised(param.shape):
                state[f"{name}_code"], state[f"{name}_scale"] = quantise(zeros, signed=signed)
            else:
                state[name] = zeros.view(part.shape)
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
        part, start = local(params[0]), place_of(params[0]).start
        param, grad, state = join([part]), join([local_grad(params[0])]), self.state[params[0]]
        if self.kernel != "compiled" or not compiled.adamw8bit_(param, grad, state, start=start, **settings):
            for piece in pieces(grad):
                update(param, grad, state, piece, start=start, **settings)
        spread_(param, [part])


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
    """One step of a piece, a multiple of 256, of a weight and its quantised state, in place, if `finite`.

    The step itself sees moments not rounded. The random bits are those of `key` for the places from `start` on, at which the weight is.
    """
    blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
    parts = {name: state[name][piece if name.endswith("code") else blocks] for name in state if name != "step"}
    exp_avg = dequantise(parts["exp_avg_code"], parts["exp_avg_scale"], signed=True)
    exp_avg_sq = dequantise(parts["exp_avg_sq_code"], parts["exp_avg_sq_scale"], signed=False)
    value, exp_avg, exp_avg_sq = adamw(param[piece], grad[piece], exp_avg, exp_avg_sq, **settings)
    copy_stochastic_(param[piece], value, draw_for(param[piece], key, start + piece.start, rows=1), finite)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        code, scale = quantise(moment, signed=name == "exp_avg")
        write_(parts[f"{name}_code"], code, finite)
        write_(parts[f"{name}_scale"], scale, finite)
