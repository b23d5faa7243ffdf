"""An exponential moving average of the weights, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


def decay_at(step: int, *, decay: float, warmup: bool) -> float:
    """The share that is kept at optimizer step `step`, from 0: min(decay, (1 + t) / (10 + t)) with warm-up, t = step + 1."""
    return min(decay, (2 + step) / (11 + step)) if warmup else decay


class Ema:
    """The average of a model's parameters. `device` is where it lives; None keeps each beside its parameter."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, decay: float, warmup: bool, device: torch.device | None) -> None:
        self._parameters = dict(parameters)
        self._decay, self._warmup = decay, warmup
        self.average = {
            name: p.detach().to(device=device or p.device, dtype=torch.float32, copy=True) for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights as they are after optimizer step `step`."""
        weight = 1.0 - decay_at(step, decay=self._decay, warmup=self._warmup)
        for name, p in self._parameters.items():
            average = self.average[name]
            average.lerp_(p.detach().to(device=average.device, dtype=torch.float32), weight)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Puts the average into the model for the block; afterwards the weights are what they were, bit for bit."""
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.copy_(self.average[name])
            yield
        finally:
            for name, p in self._parameters.items():
                p.copy_(kept[name])


@contextlib.contextmanager
def averaged(ema: Ema | None) -> Iterator[None]:
    """The averaged weights if there are any, the weights themselves if not."""
    with ema.applied() if ema is not None else contextlib.nullcontext():
        yield
