"""Optimizers whose step is made of small ones that need nothing of each other: each can be taken as soon as its gradients are there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from aquatint.optim.flat import batches
from aquatint.optim.rounding import rounding_generator

JOINED_ELEMENTS = 1 << 20

State = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """Weights that are stepped together: a large one alone, or small neighbours of one kind.

    `index` is its place in the optimizer's order, `group` the parameter group with its settings.
    """

    index: int
    group: dict[str, Any]
    params: tuple[Tensor, ...]


class Tensorwise(Protocol):
    """An optimizer that can be stepped unit by unit, in any order, with the same bits as in one step."""

    param_groups: list[dict[str, Any]]

    def units(self) -> list[Unit]:
        """All weights, each in one unit; the same at every step."""

    def update(self, unit: Unit) -> None:
        """Step those weights of a unit that have a gradient."""


class TensorwiseOptimizer(Optimizer):
    """What our optimizers share: steps by unit, a step count for each weight, and a state that keeps its dtypes when loaded."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure else None
        for unit in self.units():
            self.update(unit)
        return loss

    def units(self) -> list[Unit]:
        """All weights, in order."""
        units: list[Unit] = []
        for group in self.param_groups:
            for params in batches(group["params"], self.kind, JOINED_ELEMENTS):
                units.append(Unit(len(units), group, tuple(params)))
        return units

    @torch.no_grad()
    def update(self, unit: Unit) -> None:
        """Step those weights of a unit that have a gradient; in a unit of several, those with as many steps behind them at once."""
        params = [param for param in unit.params if param.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param] = {"step": torch.zeros((), dtype=torch.float32), **self.initial_state(param, unit.group)}
        steps = [int(self.state[param]["step"]) for param in params]
        for step in sorted(set(steps)):
            together = [param for param, own in zip(params, steps, strict=True) if own == step]
            self.advance(together, unit, step + 1)
            for param in together:
                self.state[param]["step"] += 1

    def generator(self, unit: Unit, step: int) -> torch.Generator:
        """The random bits of a unit's step."""
        return rounding_generator(unit.group["seed"], unit.index, step, unit.params[0].device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but every state tensor keeps its dtype: torch would cast float32 state to that of its weight."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for param, index in zip(params, saved, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[param][key] = value if key == "step" else value.to(param.device)

    def kind(self, param: Tensor) -> Hashable:
        """What small weights must share to be stepped together."""
        return param.device, param.dtype

    @abstractmethod
    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        """The state of a weight before its first step, but for the step count."""

    @abstractmethod
    def advance(self, params: Sequence[Tensor], unit: Unit, step: int) -> None:
        """Step weights of one kind, all of them at `step`, counted from 1."""
