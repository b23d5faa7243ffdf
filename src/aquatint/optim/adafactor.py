"""Adafactor with a fixed learning rate and no momentum: the second moment of a matrix is kept as its row and column means.

For SDXL's UNet that state is 18 MiB, where AdamW's is 20 GB. A convolution counts as the matrix (O, I kh kw): factored
over its 3 x 3 kernel, as is common, its state would be fifty times as large and its approximation poor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aquatint.optim.rounding import copy_stochastic_, rounding_generators

EPS = 1e-30  # epsilon_1 of the paper: keeps the root of a zero gradient's second moment from being 0

State = dict[str, Tensor]


def initial_state(param: Tensor) -> State:
    """Step 0 and empty second moments, float32: row and column means of a matrix (O, I) or convolution (O, I, kh, kw)."""
    zeros = partial(torch.zeros, dtype=torch.float32, device=param.device)
    step = torch.zeros((), dtype=torch.float32)
    if param.dim() < 2:
        return {"step": step, "exp_avg_sq": zeros(param.shape)}
    rows = param.shape[0]
    return {"step": step, "exp_avg_sq_row": zeros(rows), "exp_avg_sq_col": zeros(param.numel() // rows)}


def second_moment_decay(step: int, decay_power: float) -> float:
    """1 - t^-c with steps from 1: the first one takes its own gradient alone (arXiv 1804.04235, section 7)."""
    return 1 - math.pow(step, -decay_power)


def factored(grad: Tensor, row: Tensor, col: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Update g / sqrt(V) of a matrix (O, I), and the new row (O,) and column (I,) means of g^2; all float32.

    V = row col^T / mean(row) (arXiv 1804.04235, algorithm 4, with means for sums).
    """
    row_mean, col_mean = mean_squares(grad)
    row = decay * row + (1 - decay) * row_mean
    col = decay * col + (1 - decay) * col_mean
    update = grad * (row / row.mean()).rsqrt().unsqueeze(1)
    return update.mul_(col.rsqrt()), row, col


def mean_squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Means of g^2 + EPS over each row and over each column of a matrix (O, I): (O,) and (I,)."""
    square = grad.square()
    return square.mean(dim=1) + EPS, square.mean(dim=0) + EPS


def unfactored(grad: Tensor, exp_avg_sq: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Update g / sqrt(V) of a vector, and its new V; all float32 (arXiv 1804.04235, algorithm 5)."""
    exp_avg_sq = decay * exp_avg_sq + (1 - decay) * (grad.square() + EPS)
    return grad * exp_avg_sq.rsqrt(), exp_avg_sq


def clip_rms(update: Tensor, threshold: float) -> Tensor:
    """`update`, made smaller if its root mean square is over `threshold` (arXiv 1804.04235, section 6)."""
    rms: Tensor = torch.linalg.vector_norm(update) / math.sqrt(update.numel())
    return update / (rms / threshold).clamp(min=1.0)


def adafactor_update(grad: Tensor, state: State, *, step: int, decay_power: float, clip_threshold: float) -> tuple[Tensor, State]:
    """Unit-sized update in the shape of `grad`, float32, and the state after it."""
    decay = second_moment_decay(step, decay_power)
    if grad.dim() < 2:
        update, exp_avg_sq = unfactored(grad.float(), state["exp_avg_sq"], decay)
        return clip_rms(update, clip_threshold), {"exp_avg_sq": exp_avg_sq}
    update, row, col = factored(grad.flatten(1).float(), state["exp_avg_sq_row"], state["exp_avg_sq_col"], decay)
    return clip_rms(update, clip_threshold).view(grad.shape), {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


class Adafactor(Optimizer):
    """Adafactor over bfloat16 (stochastically rounded) or float32 weights; its state is always float32.

    `lr` is the size of a step, neither scaled by the size of the weights nor decayed. `seed` keys the rounding.
    It is part of the parameter groups, and so of the state dict.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        decay_power: float = 0.8,
        seed: int,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_threshold": clip_threshold, "decay_power": decay_power}
        super().__init__(params, {**defaults, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure else None
        generators = rounding_generators(self)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group, generators[param.device])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but state stays float32: torch would cast that of bfloat16 weights to bfloat16."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for param, index in zip(params, saved, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[param][key] = value if key == "step" else value.to(param.device)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[param] or initial_state(param)
        step = int(state["step"]) + 1
        settings = {key: group[key] for key in ("decay_power", "clip_threshold")}
        update, second_moment = adafactor_update(grad, state, step=step, **settings)
        value = ((1 - group["lr"] * group["weight_decay"]) * param.float()).sub_(update, alpha=group["lr"])
        copy_stochastic_(param, value, generator)
        self.state[param] = {"step": torch.tensor(float(step)), **second_moment}
