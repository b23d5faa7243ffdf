"""From a name and settings to an optimizer, and what its state will weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from aquatint.optim.adafactor import Adafactor
from aquatint.optim.adamw_bf16 import AdamWBF16

STEP_BYTES = 4  # each tensor's step count


def parameter_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: matrices and convolutions with weight decay, norms and biases (one dimension) without.

    Names go along, so that each group of the optimizer has its `param_names`. A group without members is left out.
    """
    named = list(named_parameters)
    decayed = {"params": [(name, param) for name, param in named if param.dim() >= 2], "weight_decay": weight_decay}
    others = {"params": [(name, param) for name, param in named if param.dim() < 2], "weight_decay": 0.0}
    return [group for group in (decayed, others) if group["params"]]


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    seed: int,
    learning_rate: float,
    weight_decay: float,
    **settings: Any,
) -> Optimizer:
    """The optimizer called `name`, over two parameter groups; `settings` are its own, `seed` keys its rounding.

    Raises ValueError for a name that is not adamw, adamw_bf16 or adafactor.
    """
    groups = parameter_groups(named_parameters, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **settings)
    if name == "adamw_bf16":
        return AdamWBF16(groups, lr=learning_rate, seed=seed, **settings)
    if name == "adafactor":
        return Adafactor(groups, lr=learning_rate, seed=seed, **settings)
    raise ValueError(f"unknown optimizer {name!r}; there are adamw, adamw_bf16 and adafactor")


def state_bytes(name: str, shapes: Iterable[Sequence[int]], param_bytes: int) -> int:
    """What the optimizer's state weighs in memory once it has made a step, from the shapes of the weights alone.

    `param_bytes` is the size of one element of the weights: 4 for float32, 2 for bfloat16. AdamW's two moments have it too.
    """
    shapes = [tuple(shape) for shape in shapes]
    if name == "adafactor":
        return sum(4 * adafactor_elements(shape) + STEP_BYTES for shape in shapes)
    return sum(2 * param_bytes * math.prod(shape) + STEP_BYTES for shape in shapes)


def adafactor_elements(shape: Sequence[int]) -> int:
    """Rows plus columns of a matrix or convolution, or all elements of a vector."""
    return math.prod(shape) if len(shape) < 2 else shape[0] + math.prod(shape[1:])
