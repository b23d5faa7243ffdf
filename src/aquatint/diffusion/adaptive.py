"""Loss weights that follow the loss: each range of timesteps counts by the inverse of its own recent mean.

The state is a tensor (2, T) float64 over T equal ranges of timesteps: a decaying sum of losses, and the decaying sum of ones that it is
to be divided by. It is a cheap relative of the learned uncertainty of arXiv 2312.02696, whose optimum is that inverse too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquatint.diffusion.schedule import NUM_TIMESTEPS

LEAST_MEAN = 1e-3


def no_losses(num_ranges: int) -> Tensor:
    """The state before the first step. Raises ValueError unless 1000 timesteps make so many equal ranges."""
    if num_ranges < 1 or NUM_TIMESTEPS % num_ranges:
        raise ValueError(f"{NUM_TIMESTEPS} timesteps cannot be cut into {num_ranges} equal ranges")
    return torch.zeros(2, num_ranges, dtype=torch.float64)


def range_sums(timesteps: Tensor, losses: Tensor, num_ranges: int) -> Tensor:
    """Sum and number of losses (B,) in each range, (2, T) float64. Those of several processes or batches can be added up.

    The losses are unweighted. Those that are not finite are left out.
    """
    places = timesteps * num_ranges // NUM_TIMESTEPS
    known = losses.isfinite()
    values = torch.stack([losses.double().where(known, 0.0), known.double()])
    sums = torch.zeros(2, num_ranges, dtype=torch.float64, device=losses.device)
    return sums.index_add_(1, places, values)


def update(state: Tensor, sums: Tensor, *, decay: float) -> Tensor:
    """The state after a step with these `range_sums`; `decay` is the share that is kept for each sample that a range has had."""
    total, count = sums
    kept: Tensor = decay**count
    mean = total / count.clamp(min=1)
    return kept * state + (1 - kept) * torch.stack([mean, torch.ones_like(mean)])


def adaptive_weights(state: Tensor, density: Tensor) -> Tensor:
    """Weight 1 / (mean + 0.001) of each timestep, (1000,) float32, scaled to a mean of 1 where they come with `density` (1000,).

    A range without losses counts as the mean of the others; without any losses, all weights are 1.
    """
    known = state[1] > 0
    if not known.any():
        return torch.ones(NUM_TIMESTEPS, device=state.device)
    means = state[0] / state[1].where(known, 1.0)
    means = means.where(known, means[known].mean())
    weights = (1 / (means + LEAST_MEAN)).repeat_interleave(NUM_TIMESTEPS // len(means))
    density = density.to(weights)
    return (weights * density.sum() / (weights * density).sum()).float()
