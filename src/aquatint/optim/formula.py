"""AdamW's update as one pure function.

Every operation is rounded on its own, and correctly, so that all devices and kernels give the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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
    return advance(param, grad, exp_avg, exp_avg_sq, c)


def advance(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """`adamw` with what it multiplies with already known."""
    grad = grad.float()
    exp_avg = exp_avg.to(torch.float32, copy=True).mul_(c.beta1).add_(grad * c.rest1)
    exp_avg_sq = exp_avg_sq.to(torch.float32, copy=True).mul_(c.beta2).add_((grad * grad).mul_(c.rest2))
    param = param.to(torch.float32, copy=True).mul_(c.decay)
    param.addcdiv_(exp_avg * c.step_size, root(exp_avg_sq).add_(c.eps), value=-1)
    return param, exp_avg, exp_avg_sq
