"""The loss of a sample."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Loss = Literal["mse", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]

LOSSES: tuple[Loss, ...] = get_args(Loss)
HUBER_SCHEDULES: tuple[HuberSchedule, ...] = get_args(HuberSchedule)


def per_sample_mse(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over C, H, W of each sample, (B,) float32: weights are per sample, so the batch is not averaged here.

    With a mask (B, 1, H, W) in 0..1 it is the mean weighted by the mask, so that the size of the masked part does not
    act as a learning rate; an empty mask gives 0.
    """
    return _per_sample((output.float() - target.float()).square(), mask)


def per_sample_loss(loss: Loss, output: Tensor, target: Tensor, mask: Tensor | None = None, *, c: Tensor | float = 0.1) -> Tensor:
    """As `per_sample_mse`, with another function of the difference d in the place of its square (arXiv 2403.16728).

    "huber" is 2 c (sqrt(d^2 + c^2) - c): d^2 for small differences, 2 c |d| for large ones. "smooth_l1" is that divided by c. `c` is
    one number or one per sample (B,), see `huber_c`.
    """
    square = (output.float() - target.float()).square()
    if loss == "mse":
        return _per_sample(square, mask)
    bend = torch.as_tensor(c, dtype=torch.float32, device=square.device).reshape(-1, *[1] * (square.dim() - 1))
    smooth_l1 = 2 * square / ((square + bend.square()).sqrt() + bend)  # without the difference of two almost equal numbers
    return _per_sample(bend * smooth_l1 if loss == "huber" else smooth_l1, mask)


def huber_c(schedule: HuberSchedule, ve_sigmas: Tensor, c: float, scale: float = 1.0) -> Tensor:
    """Where the loss bends at each timestep, (1000,) float32, from `Schedule.ve_sigmas` (arXiv 2403.16728).

    "exponential" falls from 1 at timestep 0 to c at 1000; "snr" is (1 - c) / (1 + ve_sigma)^2 + c, and ends at c as well. Noisy levels
    then forgive outliers and clean ones do not. All are multiplied by `scale`.
    """
    if schedule == "constant":
        bends = torch.full_like(ve_sigmas, c)
    elif schedule == "exponential":
        bends = torch.exp(math.log(c) * torch.arange(len(ve_sigmas), dtype=torch.float64) / len(ve_sigmas))
    else:
        bends = (1 - c) / (1 + ve_sigmas).square() + c
    return (scale * bends).float()


def masked_loss_with_prior(
    loss: Loss, output: Tensor, target: Tensor, prior: Tensor, mask: Tensor, *, prior_weight: float, c: Tensor | float = 0.1
) -> Tensor:
    """The loss inside the mask, plus `prior_weight` times the loss against `prior`, the frozen model's output, outside of it. (B,)

    Each part is a mean over its own area, and 0 where that is empty.
    """
    inside = per_sample_loss(loss, output, target, mask, c=c)
    return inside + prior_weight * per_sample_loss(loss, output, prior, 1 - mask, c=c)


def _per_sample(error: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over all but the first dimension, weighted by the mask."""
    error = error.mean(dim=1, keepdim=True)
    if mask is None:
        return error.flatten(1).mean(dim=1)
    weight = mask.flatten(1)
    return (error.flatten(1) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
