"""AdamW for bfloat16 weights, with bfloat16 moments: 6 bytes per weight where float32 takes 12.

The math is float32, and the moments are rounded stochastically (see `rounding`): rounded to the nearest, the second moment would
never decay. So are the weights; or they are rounded to the nearest, and what that leaves is kept in a third bfloat16 number and added at
the next step (Kahan summation), for 2 bytes more. With float32 weights the moments are float32 too, and it is plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aquatint.optim.flat import join, pieces, spread_
from aquatint.optim.rounding import copy_stochastic_
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

Rounding = Literal["stochastic", "kahan"]
NAMES = ("exp_avg", "exp_avg_sq", "compensation")  # of the state, in the order in which `adamw_` takes them
ADAMW_SETTINGS = ("lr", "betas", "eps", "weight_decay")


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
    beta1, beta2 = betas
    grad = grad.float()
    exp_avg = torch.lerp(exp_avg.float(), grad, 1 - beta1)
    exp_avg_sq = (beta2 * exp_avg_sq.float()).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    param = ((1 - lr * weight_decay) * param.float()).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    return param, exp_avg, exp_avg_sq


def compensated(param: Tensor, compensation: Tensor) -> Tensor:
    """The float32 value that a weight and what its rounding left stand for together."""
    return param.float() + compensation.float()


def compensate_(param: Tensor, compensation: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write a float32 value as the nearest bfloat16 and what that leaves: 16 bits of precision in two numbers of 8.

    The second is rounded stochastically. To the nearest, as is usual, its error is the same at each of many equal steps: 1,000 of
    -1e-4 go from 1 to 0.90056.
    """
    param.copy_(value)
    copy_stochastic_(compensation, value - param.float(), generator)


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
        seed: int,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults)

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        compensates = group["rounding"] == "kahan" and param.dtype == torch.bfloat16
        return {name: torch.zeros_like(param) for name in NAMES if name != "compensation" or compensates}

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int) -> None:
        names = [name for name in NAMES if name in self.state[params[0]]]
        targets = [params, *([self.state[param][name] for param in params] for name in names)]
        joined = [join(tensors) for tensors in targets]
        grad = join([param.grad for param in params if param.grad is not None])
        settings = {key: unit.group[key] for key in ADAMW_SETTINGS}
        generator = self.generator(unit, step)
        for piece in pieces(grad):
            adamw_(*(vector[piece] for vector in (grad, *joined)), step=step, generator=generator, **settings)
        for tensors, vector in zip(targets, joined, strict=True):
            spread_(vector, tensors)


def adamw_(
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor | None = None,
    *,
    generator: torch.Generator,
    **settings: Any,
) -> None:
    """`adamw` in place: moments, and weights without compensation, are rounded as `copy_stochastic_` does."""
    start = param if compensation is None else compensated(param, compensation)
    value, new_exp_avg, new_exp_avg_sq = adamw(start, grad, exp_avg, exp_avg_sq, **settings)
    copy_stochastic_(exp_avg, new_exp_avg, generator)
    copy_stochastic_(exp_avg_sq, new_exp_avg_sq, generator)
    if compensation is None:
        copy_stochastic_(param, value, generator)
    else:
        compensate_(param, compensation, value, generator)
