"""The average that schedule-free training makes by itself, where other runs have a moving average.

While it trains, the model holds y, at which gradients are taken. What is measured, drawn and exported is x, where y = (1 - b1) z + b1 x
(arXiv 2405.15682, equation 1). A checkpoint holds y and z as they are, and x follows from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from aquatint.optim.library_optimizer import LibraryOptimizer, iterate_average
from aquatint.tensor_file import LazyTensor

ITERATE = "z"


class FreeAverage:
    """Stands where an `Ema` would: x, made when it is asked for. It has no tensors of its own, and steps need not tell it anything."""

    def __init__(self, optimizer: LibraryOptimizer) -> None:
        self._optimizer = optimizer
        self.tracks: Mapping[float, Mapping[str, torch.Tensor]] = {}

    @property
    def average(self) -> dict[str, LazyTensor]:
        """x by name, each made when its turn comes."""
        return {
            name: LazyTensor(param.dtype, tuple(param.shape), partial(self._average_of, param, group))
            for group, name, param in self._weights()
        }

    def tables(self) -> dict[str, dict[str, torch.Tensor]]:
        """Nothing that a checkpoint would not hold anyway."""
        return {}

    def start_at(self, step: int, samples: int) -> None:
        """Nothing depends on where the run stands."""

    def update(self, step: int, finite: torch.Tensor | None = None) -> None:
        """The optimizer's step was the update."""

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Puts x into the model for the block; afterwards the weights are y again, bit for bit."""
        kept = [(param, param.detach().to("cpu", copy=True)) for _, _, param in self._weights()]
        try:
            for group, _, param in self._weights():
                param.copy_(self._average_of(param, group))
            yield
        finally:
            for param, weight in kept:
                param.copy_(weight)

    def _weights(self) -> Iterator[tuple[Mapping[str, object], str, torch.nn.Parameter]]:
        for group in self._optimizer.param_groups:
            yield from ((group, name, param) for name, param in zip(group["param_names"], group["params"], strict=True))

    def _average_of(self, param: torch.nn.Parameter, group: Mapping[str, tuple[float, float]]) -> torch.Tensor:
        return iterate_average(param.detach(), self._optimizer.state.get(param, {}).get(ITERATE), group["betas"][0])


def averages_of(weights: Mapping[str, LazyTensor], state: Mapping[str, LazyTensor], beta1: float) -> dict[str, LazyTensor]:
    """x of a checkpoint's weights y and its optimizer's tensors, each made when its turn comes."""

    def average(name: str) -> torch.Tensor:
        iterate = state.get(f"{name}/{ITERATE}")
        return iterate_average(weights[name].load(), None if iterate is None else iterate.load(), beta1)

    return {name: LazyTensor(weight.dtype, weight.shape, partial(average, name)) for name, weight in weights.items()}
