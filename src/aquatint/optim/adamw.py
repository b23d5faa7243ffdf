"""torch's own AdamW in its fused form, which can also be stepped tensor by tensor, or left out by the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from aquatint.optim.offload import MainMemory, held
from aquatint.optim.sharded import local, local_grad
from aquatint.optim.tensorwise import Unit


class AdamW(torch.optim.AdamW):
    """AdamW of torch (arXiv 1711.05101): same settings, same state, same bits.

    A step that is left out is counted, as `TensorwiseOptimizer` says; torch would not count it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.keeper: MainMemory | None = None  # of a state that is not to be beside the weights
        self.one = torch.ones((), device="cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, finite: Tensor | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient. Where the bool scalar `finite` is False, the step is left out."""
        loss = torch.enable_grad()(closure)() if closure else None
        if self.keeper is None:
            for group in self.param_groups:
                self._advance(group, group["params"], finite)
        else:
            for unit in self.units():
                self.update(unit, finite)
        return loss

    def units(self) -> list[Unit]:
        """Every tensor on its own: the fused kernel takes them one by one as well."""
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        return [Unit(index, group, (param,)) for index, (group, param) in enumerate(pairs)]

    @torch.no_grad()
    def update(self, unit: Unit, finite: Tensor | None = None) -> None:
        """A step of this optimizer as if it had no other weights."""
        with held(self.keeper, unit.index, unit.params, self.state):
            self._advance(unit.group, unit.params, finite)

    def _advance(self, group: dict[str, Any], params: Sequence[Tensor], finite: Tensor | None) -> None:
        params = [param for param in params if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param) for param in params]
        steps, exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        if steps[0].is_cpu:  # where each count is added to on its own, and a plain 1 made a tensor each time
            torch._foreach_add_(steps, self.one, alpha=1)
        else:
            torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [local(param) for param in params], [local_grad(param) for param in params], exp_avgs, exp_avg_sqs, [], steps,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=False, found_inf=None if finite is None else finite.logical_not().float(),
        )  # fmt: skip

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(local(param)), torch.zeros_like(local(param))
        return state
