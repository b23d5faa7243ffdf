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
from aquatint.optim.offload import MainMemory, held
from aquatint.optim.rounding import Key, rounding_key
from aquatint.optim.sharded import gathered
from aquatint.optim.sizes import JOINED_ELEMENTS

State = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """Weights that are stepped together: a large one alone, or small neighbours of one kind.

    `index` is its place in the optimizer's order, `group` the parameter group with its settings.
    """

    index: int
    group: dict[str, Any]
    params: tuple[Tensor, ...]


def undecided(finite: Tensor | None) -> Tensor | None:
    """`finite`, or None where it is in main memory and True: then nothing has to choose between old and new."""
    return None if finite is not None and finite.device.type == "cpu" and finite.numpy() else finite


class Tensorwise(Protocol):
    """An optimizer that can be stepped unit by unit, in any order, with the same bits as in one step."""

    param_groups: list[dict[str, Any]]

    def units(self) -> list[Unit]:
        """All weights, each in one unit; the same at every step."""

    def update(self, unit: Unit, finite: Tensor | None = None) -> None:
        """Step those weights of a unit that have a gradient. Where the bool scalar `finite` is False, the step is left out."""


class TensorwiseOptimizer(Optimizer):
    """What our optimizers share: steps by unit, a step count for each weight, and a state that keeps its dtypes when loaded.

    A step that is left out changes neither weights nor state, but it is counted. Bias corrections, random bits and decays go by the
    count, and so the host knows them without asking the device whether a step was taken.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.keeper: MainMemory | None = None  # of a state that is not to be beside the weights
        self._counted: dict[Tensor, tuple[Tensor, int]] = {}  # of each weight: its step count, as a tensor and as a number

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, finite: Tensor | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient. Where the bool scalar `finite` is False, the step is left out."""
        loss = torch.enable_grad()(closure)() if closure else None
        for unit in self.units():
            self.update(unit, finite)
        return loss

    def units(self) -> list[Unit]:
        """All weights, in order."""
        units: list[Unit] = []
        for group in self.param_groups:
            for params in batches(group["params"], self.kind, JOINED_ELEMENTS):
                units.append(Unit(len(units), group, tuple(params)))
        return units

    @torch.no_grad()
    def update(self, unit: Unit, finite: Tensor | None = None) -> None:
        """Step those weights of a unit that have a gradient; in a unit of several, those with as many steps behind them at once."""
        with held(self.keeper, unit.index, unit.params, self.state):
            self._update(unit, undecided(finite))

    def _update(self, unit: Unit, finite: Tensor | None) -> None:
        params = [param for param in unit.params if param.grad is not None]
        if not params:
            return
        with gathered(params, self.state, self.steps_part) as tensors:
            for tensor in tensors:
                if not self.state[tensor]:
                    count = torch.zeros((), dtype=torch.float32)
                    self.state[tensor].update({"step": count, **self.initial_state(tensor, unit.group)})
            steps = [self._steps_of(param) for param in params]
            for step in sorted(set(steps)):
                self.advance([tensor for tensor, own in zip(tensors, steps, strict=True) if own == step], unit, step + 1, finite)
        counts = [self.state[param]["step"] for param in params]
        for param, count, step in zip(params, counts, steps, strict=True):
            count.add_(1)
            self._counted[param] = count, step + 1

    def _steps_of(self, param: Tensor) -> int:
        """How many steps a weight has behind it. A tensor is read only once: to read one in every step takes longer than to count along."""
        count = self.state[param]["step"]
        tensor, known = self._counted.get(param, (None, 0))
        return known if tensor is count else int(count)

    def key(self, unit: Unit, step: int) -> Key:
        """What the random bits of a unit's step are drawn from."""
        return rounding_key(unit.group["seed"], unit.index, step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counted = {}

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

    def steps_part(self, param: Tensor) -> bool:
        """Whether the part of a sharded weight that a process holds can be stepped there. If not, each process steps the whole."""
        return False

    @abstractmethod
    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        """The state of a weight before its first step, or of the part of it that is here; but for the step count."""

    @abstractmethod
    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        """Step weights of one kind, all of them at `step`, counted from 1; where `finite` is there and False, change no bit of anything."""
