"""AdamW for bfloat16 weights, with bfloat16 moments: 6 bytes per weight where float32 takes 12.

The math is float32, and all three results are rounded stochastically (see `rounding`): rounded to the nearest, updates smaller
than half a step of the weight would vanish, and the second moment would never decay. With float32 weights the moments are
float32 too, and it is plain AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aquatint.optim.flat import batches, join, write_
from aquatint.optim.rounding import rounding_generators

JOINED_ELEMENTS = 1 << 20


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


class AdamWBF16(Optimizer):
    """AdamW over bfloat16 or float32 weights; the moments have the dtype of their weight.

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
        seed: int,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure else None
        generators = rounding_generators(self)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                self._create_state(param)
            for batch in batches(params, self._kind, JOINED_ELEMENTS):
                self._update(batch, group, generators[batch[0].device])
        return loss

    def _create_state(self, param: Tensor) -> None:
        if not self.state[param]:
            moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            self.state[param] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    def _kind(self, param: Tensor) -> Hashable:
        """What weights that are updated together must share."""
        return param.device, param.dtype, int(self.state[param]["step"])

    def _update(self, params: Sequence[Tensor], group: dict[str, Any], generator: torch.Generator) -> None:
        states = [self.state[param] for param in params]
        for state in states:
            state["step"] += 1
        grads = [param.grad for param in params if param.grad is not None]
        targets = (params, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])
        joined_param, joined_exp_avg, joined_exp_avg_sq = map(join, targets)
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        results = adamw(joined_param, join(grads), joined_exp_avg, joined_exp_avg_sq, step=int(states[0]["step"]), **settings)
        for tensors, result in zip(targets, results, strict=True):
            write_(tensors, result, generator)
