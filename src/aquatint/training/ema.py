"""Moving averages of the weights, in float32: an exponential one, and any number whose memory grows with the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from aquatint.optim.power_average import gamma_of_std, power_decay


class Applied(Protocol):
    """What can put other weights into the model for a while."""

    def applied(self) -> contextlib.AbstractContextManager[None]: ...


def decay_at(step: int, *, decay: float, warmup: bool) -> float:
    """The share that is kept at optimizer step `step`, from 0: min(decay, (1 + t) / (10 + t)) with warm-up, t = step + 1."""
    return min(decay, (2 + step) / (11 + step)) if warmup else decay


def decay_of_half_life(half_life_samples: float, samples_per_step: int) -> float:
    """The share that a step keeps, so that weights count half as much after `half_life_samples`, whatever the size of a step."""
    return float(0.5 ** (samples_per_step / half_life_samples))


def track_name(std: float) -> str:
    """What the power average of this width is called in file names: `power-0.050`."""
    return f"power-{std:.3f}"


class Ema:
    """The averages of a model's parameters. `device` is where they live; None keeps each beside its parameter.

    `average` is the exponential one. `tracks` has one per relative standard deviation, of EDM2's kind (see `optim.power_average`).
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        decay: float,
        warmup: bool,
        device: torch.device | None,
        power_stds: Sequence[float] = (),
        samples_per_step: int = 1,
    ) -> None:
        self._parameters = dict(parameters)
        self._decay, self._warmup = decay, warmup
        self._gammas = {std: gamma_of_std(std) for std in power_stds}
        self._samples_per_step = samples_per_step
        self._start = (0, 0)
        self.average = self._copy(device)
        self.tracks = {std: self._copy(device) for std in power_stds}

    def _copy(self, device: torch.device | None) -> dict[str, torch.Tensor]:
        return {name: p.detach().to(device=device or p.device, dtype=torch.float32, copy=True) for name, p in self._parameters.items()}

    def start_at(self, step: int, samples: int) -> None:
        """Says where the run stands, for the first `update` in this process. A run that has just begun stands at 0 and 0."""
        self._start = (step, samples)

    def tables(self) -> dict[str, dict[str, torch.Tensor]]:
        """All averages by the names of their files."""
        return {"ema": self.average, **{track_name(std): track for std, track in self.tracks.items()}}

    @torch.no_grad()
    def update(self, step: int, finite: torch.Tensor | None = None) -> None:
        """Moves the averages towards the weights as they are after optimizer step `step`; not where the bool scalar `finite` is False.

        Averages that live in main memory make the host wait for the weights.
        """
        samples = self._start[1] + (step + 1 - self._start[0]) * self._samples_per_step
        moves = [(self.average, 1.0 - decay_at(step, decay=self._decay, warmup=self._warmup))]
        moves += [(track, 1.0 - power_decay(samples, self._samples_per_step, self._gammas[std])) for std, track in self.tracks.items()]
        shares = [weight if finite is None else weight * finite.to(next(iter(average.values())).device) for average, weight in moves]
        for name, p in self._parameters.items():
            value = p.detach().to(device=self.average[name].device, dtype=torch.float32)
            for (average, _), share in zip(moves, shares, strict=True):
                average[name].lerp_(value, share)

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
def averaged(ema: Applied | None) -> Iterator[None]:
    """The averaged weights if there are any, the weights themselves if not."""
    with ema.applied() if ema is not None else contextlib.nullcontext():
        yield
