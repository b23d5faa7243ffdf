"""Optimizers of other libraries, behind the contract of ours: groups with factors, steps that can be left out, a state by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aquatint.optim.adamw import AdamW
from aquatint.optim.library import LIBRARY, Entry, check_installed
from aquatint.optim.library_sizes import is_hidden_matrix
from aquatint.optim.library_state import fill_bitsandbytes, fill_torchao, numbers_in, plain_state, tensors_of

Groups = Sequence[dict[str, Any]]
ADAMW_SETTINGS = ("betas", "eps")


class LibraryOptimizer:
    """One optimizer of a library, or several that share the weights, stepped as one.

    They know nothing of a step that is left out, so the host waits for the device to say whether it is. Such a step is not counted.
    """

    def __init__(self, parts: Sequence[Optimizer], entry: Entry) -> None:
        self.parts, self.entry = tuple(parts), entry
        self.state = self.parts[0].state
        for part in self.parts:
            part.state = self.state
        self._rates = [torch.zeros(()) for _ in self.param_groups] if entry.layout == "torchao" else []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, each with its `param_names` and its `factor`."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self, finite: Tensor | None = None) -> None:
        """Update every weight that has a gradient, unless the bool scalar `finite` is False."""
        if finite is not None and not finite:
            return
        for group, rate in zip(self.param_groups, self._rates, strict=False):  # torchao wants tensors that stay the same
            group["lr"] = rate.fill_(group["lr"])
        for part in self.parts:
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, as `parameter name/key`, and as `group 0/key` what a group counts."""
        named = {f"group {index}/{key}": tensor for index, group in enumerate(self.param_groups) for key, tensor in self._counted(group)}
        for _, name, param in self._places():
            named |= {f"{name}/{key}": tensor for key, tensor in tensors_of(self.state.get(param, {}))}
        return named

    def fill(self, saved: Mapping[str, Callable[[], Tensor]]) -> None:
        """Takes what `tensors` gave, each read when its turn comes. Raises ValueError for what is not of these weights and groups."""
        owners: dict[str, dict[str, Callable[[], Tensor]]] = {}
        for key, read in saved.items():
            owner, _, name = key.rpartition("/")
            owners.setdefault(owner, {})[name] = read
        for index, group in enumerate(self.param_groups):
            found = {name: read() for name, read in owners.pop(f"group {index}", {}).items()}
            if found.keys() != {name for name, _ in self._counted(group)}:
                raise ValueError(f"what it counts in group {index} is not what {self.entry.kind} counts")
            group.update(numbers_in(found))
        for place, name, param in self._places():
            if name in owners:
                self._fill_weight(place, param, {key: read() for key, read in owners.pop(name).items()})
        if owners:
            raise ValueError(f"it holds state of `{next(iter(owners))}`, which is not trained here")

    def _counted(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        return tensors_of({name: group[name] for name in self.entry.counters})

    def _places(self) -> Iterator[tuple[tuple[int, int], str, Tensor]]:
        """Of every weight its place (number of the group, number in it), its name, and itself."""
        for index, group in enumerate(self.param_groups):
            for number, (name, param) in enumerate(zip(group["param_names"], group["params"], strict=True)):
                yield (index, number), name, param

    def _fill_weight(self, place: tuple[int, int], param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        if self.entry.layout == "torchao":
            fill_torchao(self.parts[0], tensors, param)
        elif self.entry.layout == "bitsandbytes":
            fill_bitsandbytes(self.parts[0], tensors, param, place)
        else:
            self.state[param] = plain_state(tensors, param, self.param_groups[place[0]])


def iterate_average(weight: Tensor, iterate: Tensor | None, beta1: float) -> Tensor:
    """x from y = (1 - b1) z + b1 x (arXiv 2405.15682, equation 1); before the first step they are all the same."""
    return weight if iterate is None else weight.lerp(iterate.to(weight.device), 1 - 1 / beta1)


def create_library_optimizer(name: str, groups: Groups, *, learning_rate: float, **settings: Any) -> LibraryOptimizer:
    """The optimizer of that name in `LIBRARY`, over groups with named weights. Raises UsageError if its package is not installed."""
    check_installed(name)
    entry = LIBRARY[name]
    kind = getattr(import_module(entry.module), entry.kind)
    renamed = {entry.names.get(key, key): value for key, value in settings.items()}
    parts: list[Any] = muon_parts(kind, groups, renamed) if name == "muon" else [kind(list(groups), **entry.fixed, **renamed)]
    for part in parts:
        for group in part.param_groups:
            group["lr"] = learning_rate
            group.update({key: 0 for key in entry.counters if key not in group})  # which some only make in their first step
    if name == "schedule_free":
        parts[0].train()
    return LibraryOptimizer(parts, entry)


def muon_parts(kind: Callable[..., Optimizer], groups: Groups, settings: Mapping[str, Any]) -> list[Optimizer]:
    """Muon over the hidden matrices, and AdamW over convolutions, embeddings, norms and biases."""
    hidden, others = split_groups(groups)
    adamw = {key: settings[key] for key in ADAMW_SETTINGS}
    own = {key: value for key, value in settings.items() if key not in ADAMW_SETTINGS}
    return [*([kind(hidden, **own)] if hidden else []), *([AdamW(others, **adamw)] if others else [])]


def split_groups(groups: Groups) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups with the hidden matrices, and groups with the rest; with the settings that they had, none of them empty."""
    sides: list[list[dict[str, Any]]] = [[], []]
    for group in groups:
        for side, is_hidden in zip(sides, (True, False), strict=True):
            params = [(name, param) for name, param in group["params"] if is_hidden_matrix(name, param.shape) == is_hidden]
            if params:
                side.append({**group, "params": params})
    return sides[0], sides[1]
