"""The state that a library's optimizer keeps of a weight or a group, as named tensors, and back bit for bit.

A plain tensor goes by its own name. One that is quantised is saved in its parts: `exp_avg.codes`, `exp_avg.scale`. A number becomes
a tensor, and its name says so: `step.int`, `weight_sum.float`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

NUMBERS = {"int": torch.int64, "float": torch.float64}


def tensors_of(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of everything in a state. Raises ValueError for what is neither a tensor nor a number."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            parts = parts_of(value)
            yield from ((f"{name}.{part}", tensor) for part, tensor in parts.items()) if parts else ((name, value),)
        elif type(value).__name__ in NUMBERS:
            yield f"{name}.{type(value).__name__}", torch.tensor(value, dtype=NUMBERS[type(value).__name__])
        else:
            raise ValueError(f"a state of the type {type(value).__name__} cannot be saved: {name}")


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a quantised one is made of; none if it is plain."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {}
    return {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}


def numbers_in(tensors: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The numbers among saved tensors, by the names that the optimizer knows them by."""
    split = ((*name.rpartition("."), tensor) for name, tensor in tensors.items())
    return {name: tensor.item() for name, _, kind, tensor in split if kind in NUMBERS}


def plain_state(tensors: Mapping[str, Tensor], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a weight that is kept in plain tensors and numbers. A step count stays in main memory unless the group is fused."""
    here = {"step": param.device if group.get("fused") else torch.device("cpu")}
    plain = {name: tensor.to(here.get(name, param.device)) for name, tensor in tensors.items() if name.rpartition(".")[2] not in NUMBERS}
    return {**plain, **numbers_in(tensors)}


@torch.no_grad()
def fill_torchao(optimizer: Any, tensors: Mapping[str, Tensor], param: Tensor) -> None:
    """Puts saved tensors into new moments of torchao's."""
    state = optimizer.state[param]
    state["step"] = tensors["step"]
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        state[name] = optimizer._new_buffer(param, signed)
        for part, target in (parts_of(state[name]) or {"": state[name]}).items():
            target.copy_(tensors[f"{name}.{part}" if part else name])


@torch.no_grad()
def fill_bitsandbytes(optimizer: Any, tensors: Mapping[str, Tensor], param: Tensor, place: tuple[int, int]) -> None:
    """Puts saved tensors into a new state of bitsandbytes', which may be paged. `place` is the weight's group and its number in there."""
    optimizer.init_state(optimizer.param_groups[place[0]], param, *place)
    state = optimizer.state[param]
    for name, target in state.items():
        if isinstance(target, Tensor):
            target.copy_(tensors[name])
    state.update(numbers_in(tensors))
