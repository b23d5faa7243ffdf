"""AdamW for bfloat16 weights, with bfloat16 moments: 6 bytes per weight where float32 takes 12.

The math is float32, and the moments are rounded stochastically (see `rounding`): rounded to the nearest, the second moment would
never decay. So are the weights; or they are rounded to the nearest, and what that leaves is kept in a third bfloat16 number and added at
the next step (Kahan summation), for 2 bytes more. With float32 weights the moments are float32 too, and it is plain AdamW.

`kernels` makes the whole update in one pass over memory on a GPU, `compiled` on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from aquatint.errors import UsageError
from aquatint.optim import compiled
from aquatint.optim.flat import join, pieces, spread_
from aquatint.optim.formula import adamw
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, write_
from aquatint.optim.sharded import is_dtensor, local, local_grad, place_of
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

Rounding = Literal["stochastic", "kahan"]
Kernel = Literal["auto", "none", "compiled"]
NAMES = ("exp_avg", "exp_avg_sq", "compensation")  # of the state, in the order in which `adamw_` takes them
ADAMW_SETTINGS = ("lr", "betas", "eps", "weight_decay")
WORTH_COMPILING = 10_000_000  # weights on a CPU: each step takes 70 ms less, which soon makes up for a second


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
    `kernel` is as `chosen_kernel` has it.
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
        self.kernel = chosen_kernel(kernel, [param for group in self.param_groups for param in group["params"]])

    def steps_part(self, param: Tensor) -> bool:
        return True

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        compensates = group["rounding"] == "kahan" and param.dtype == torch.bfloat16
        return {name: torch.zeros_like(local(param)) for name in NAMES if name != "compensation" or compensates}

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        names = [name for name in NAMES if name in self.state[params[0]]]
        targets = [params, *([self.state[param][name] for param in params] for name in names)]
        settings = {"step": step, **{name: unit.group[name] for name in ADAMW_SETTINGS}}
        adamw_tensors_(targets, self.kernel, key=self.key(unit, step), finite=finite, **settings)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton can make kernels for a device: where it is installed, for GPUs from NVIDIA's Ampere on."""
    return device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def chosen_kernel(kernel: Kernel, params: Sequence[Tensor]) -> Kernel:
    """What `kernel` comes to for these weights: on a CPU, `auto` compiles if they are many and it can; on a GPU, `compiled` is as `auto`.

    Raises UsageError if a CPU is told to compile and there is no C++ compiler, or it fails; `auto` warns of one that fails.
    """
    if kernel == "none":
        return "none"
    if any(param.device.type != "cpu" for param in params):
        return "auto"
    if kernel == "compiled":
        compiled.library()
        return "compiled"
    if sum(param.numel() for param in params) < WORTH_COMPILING or compiled.compiler() is None:
        return "auto"
    try:
        compiled.library()
    except UsageError as error:
        logging.getLogger("aquatint").warning("optimizer: in plain torch, which is slower: %s", error)
        return "auto"
    return "compiled"


def adamw_tensors_(targets: Sequence[Sequence[Tensor]], kernel: Kernel, *, key: Key, finite: Tensor | None, **settings: Any) -> None:
    """`adamw_` of several weights of one kind: `targets` are the weights, their first moments, second moments, and what else there is.

    They are joined, so that there are fewer; sharded ones are taken one by one. A weight's random bits are those of its place among all
    of them either way. What is not for a compiled update is for plain torch.
    """
    update = adamw_
    if kernel == "auto" and has_kernels(targets[0][0].device):
        from aquatint.optim import kernels

        update = kernels.adamw_
    is_sharded = any(is_dtensor(param) for param in targets[0])
    groups = [[[tensor] for tensor in tensors] for tensors in zip(*targets, strict=True)] if is_sharded else [targets]
    start = 0
    for group in groups:
        params = group[0]
        first = start + place_of(params[0]).start
        columns = [[local(tensor) for tensor in tensors] for tensors in group] if is_sharded else group
        joined = [join([local_grad(param) for param in params]), *(join(tensors) for tensors in columns)]
        if kernel != "compiled" or not compiled.adamw_(*joined, key=key, start=first, finite=finite, **settings):
            for piece in pieces(joined[0]):
                update(*(vector[piece] for vector in joined), key=key, start=first + piece.start, finite=finite, **settings)
        for tensors, vector in zip(columns, joined[1:], strict=True):
            spread_(vector, tensors)
        start += sum(param.numel() for param in params)


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
