"""AdamW for bfloat16 weights, with bfloat16 moments: 6 bytes per weight where float32 takes 12.

The math is float32, and the moments are rounded stochastically (see `rounding`): rounded to the nearest, the second moment would
never decay. So are the weights; or they are rounded to the nearest, and what that leaves is kept in a third bfloat16 number and added at
the next step (Kahan summation), for 2 bytes more. With float32 weights the moments are float32 too, and it is plain AdamW.

Every operation is rounded on its own, so that all devices give the same bits. On a GPU `kernels` does them in one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aquatint.optim.flat import join, pieces, spread_
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, write_
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

Rounding = Literal["stochastic", "kahan"]
Kernel = Literal["auto", "none"]
NAMES = ("exp_avg", "exp_avg_sq", "compensation")  # of the state, in the order in which `adamw_` takes them
ADAMW_SETTINGS = ("lr", "betas", "eps", "weight_decay")


class Coefficients(NamedTuple):
    """What AdamW multiplies with at one step: beta and 1 - beta of each moment, 1 - lr wd, and what makes bias corrections pass for all.

    lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps) is step_size m / (sqrt(v) + eps') with eps' = sqrt(1 - b2^t) eps: one root and
    one division for each weight.
    """

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    decay: float
    step_size: float
    eps: float


def coefficients(*, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Coefficients:
    """Those of a step, counted from 1."""
    beta1, beta2 = betas
    correction = math.sqrt(1 - beta2**step)
    return Coefficients(beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr * correction / (1 - beta1**step), eps * correction)


def root(values: Tensor) -> Tensor:
    """The square root, correctly rounded. On a CPU it is NumPy's: torch's there is one unit off for a sixth of all numbers."""
    if values.device.type != "cpu":
        return values.sqrt()
    result = torch.empty_like(values)
    np.sqrt(values.numpy(), out=result.numpy())
    return result


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New param, exp_avg and exp_avg_sq, float32, from inputs of any float dtype (arXiv 1711.05101, algorithm 2; step from 1).

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    c = coefficients(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    grad = grad.float()
    exp_avg = exp_avg.to(torch.float32, copy=True).mul_(c.beta1).add_(grad * c.rest1)
    exp_avg_sq = exp_avg_sq.to(torch.float32, copy=True).mul_(c.beta2).add_((grad * grad).mul_(c.rest2))
    param = param.to(torch.float32, copy=True).mul_(c.decay)
    param.addcdiv_(exp_avg * c.step_size, root(exp_avg_sq).add_(c.eps), value=-1)
    return param, exp_avg, exp_avg_sq


def compensated(param: Tensor, compensation: Tensor) -> Tensor:
    """The float32 value that a weight and what its rounding left stand for together."""
    return param.float() + compensation.float()


def compensate_(param: Tensor, compensation: Tensor, value: Tensor, random_bits: Tensor, finite: Tensor | None = None) -> None:
    """Write a float32 value as the nearest bfloat16 and what that leaves: 16 bits of precision in two numbers of 8.

    The second is rounded stochastically. To the nearest, as is usual, its error is the same at each of many equal steps: 1,000 of
    -1e-4 go from 1 to 0.90056.
    """
    nearest = value.to(param.dtype)
    write_(param, nearest, finite)
    copy_stochastic_(compensation, value - nearest.float(), random_bits, finite)


class AdamWBF16(TensorwiseOptimizer):
    """AdamW over bfloat16 or float32 weights; the moments have the dtype of their weight.

    `rounding` is of bfloat16 weights. `seed` keys all random bits. Both are part of the parameter groups, and so of the state dict.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: Rounding = "stochastic",
        kernel: Kernel = "auto",
        seed: int,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults)
        self.kernel = kernel

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        compensates = group["rounding"] == "kahan" and param.dtype == torch.bfloat16
        return {name: torch.zeros_like(param) for name in NAMES if name != "compensation" or compensates}

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        names = [name for name in NAMES if name in self.state[params[0]]]
        targets = [params, *([self.state[param][name] for param in params] for name in names)]
        settings = {"step": step, **{name: unit.group[name] for name in ADAMW_SETTINGS}}
        adamw_tensors_(targets, self.kernel, key=self.key(unit, step), finite=finite, **settings)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton can make kernels for a device: where it is installed, for GPUs from NVIDIA's Ampere on."""
    return device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def adamw_tensors_(targets: Sequence[Sequence[Tensor]], kernel: Kernel, *, key: Key, finite: Tensor | None, **settings: Any) -> None:
    """`adamw_` of several weights of one kind: `targets` are the weights, their first moments, second moments, and what else there is.

    A kernel takes them one by one, which is one pass each. Otherwise they are joined, so that there are fewer. A weight's random bits
    are those of its place among all of them either way.
    """
    by_weight = list(zip(*targets, strict=True))
    update, groups = adamw_, [by_weight]
    if kernel == "auto" and has_kernels(targets[0][0].device):
        from aquatint.optim import kernels

        update, groups = kernels.adamw_, [[tensors] for tensors in by_weight]
    start = 0
    for group in groups:
        columns = list(zip(*group, strict=True))
        joined = [join(tensors) for tensors in columns]
        grad = join([param.grad for param in columns[0] if param.grad is not None])
        for piece in pieces(grad):
            update(*(vector[piece] for vector in (grad, *joined)), key=key, start=start + piece.start, finite=finite, **settings)
        for tensors, vector in zip(columns, joined, strict=True):
            spread_(vector, tensors)
        start += grad.numel()


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
    """`adamw` in place, if `finite`: moments, and weights without compensation, are rounded as `copy_stochastic_` does.

    The random bits are those of `key` for the places from `start` on.
    """
    old = param if compensation is None else compensated(param, compensation)
    value, new_exp_avg, new_exp_avg_sq = adamw(old, grad, exp_avg, exp_avg_sq, **settings)
    for_exp_avg, for_exp_avg_sq, for_param = draw_for(param, key, start)
    copy_stochastic_(exp_avg, new_exp_avg, for_exp_avg, finite)
    copy_stochastic_(exp_avg_sq, new_exp_avg_sq, for_exp_avg_sq, finite)
    if compensation is None:
        copy_stochastic_(param, value, for_param, finite)
    else:
        compensate_(param, compensation, value, for_param, finite)
