"""Which timesteps are trained, validated and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aquatint.diffusion.schedule import NUM_TIMESTEPS
from aquatint.utils.seeds import generator

Spread = Literal["strata", "lattice", "independent"]
"""How the draws of an optimizer step share out 0..1, see `spread_uniform`."""
Probabilities = npt.NDArray[np.float64]
"""How often each timestep is drawn, (1000,), with a sum of 1; see `densities`."""


def stratified_uniform(seed: int, positions: Sequence[int], samples_per_step: int) -> np.ndarray:
    """One number in [0, 1) per global sample position, float64: uniform each, and spread evenly over an optimizer step.

    The N samples of a step share out N equal strata, in an order that changes every step so that no place in the batch keeps to
    its noise level: u = (pi(i) + U) / N. The variance of a step's mean is 1/(12 N^3), not 1/(12 N). A draw depends on its own
    position alone, never on how the step is cut into batches or ranks. (k-diffusion's stratified draws, keyed.)
    """
    steps = {position // samples_per_step for position in positions}
    strata = {step: generator(seed, "timestep-strata", step).permutation(samples_per_step) for step in steps}
    places = (divmod(position, samples_per_step) for position in positions)
    stratum = np.array([strata[step][index] for step, index in places], dtype=np.float64)
    offset = np.array([generator(seed, "timestep", position).random() for position in positions])
    uniform: np.ndarray = (stratum + offset) / samples_per_step
    return uniform.clip(max=np.nextafter(1.0, 0.0))  # the end of the last stratum can round up to 1


def lattice_uniform(seed: int, positions: Sequence[int], samples_per_step: int) -> np.ndarray:
    """As `stratified_uniform`, but all samples of a step are equally far apart: u = (u0 + i / N) mod 1 (arXiv 2107.00630).

    Here too the places i change every step.
    """
    steps = {position // samples_per_step for position in positions}
    places = {step: generator(seed, "timestep-strata", step).permutation(samples_per_step) for step in steps}
    starts = {step: generator(seed, "timestep-lattice", step).random() for step in steps}
    lattice = [starts[step] + places[step][index] / samples_per_step for step, index in (divmod(p, samples_per_step) for p in positions)]
    uniform: np.ndarray = np.array(lattice, dtype=np.float64) % 1.0
    return uniform


def spread_uniform(spread: Spread, seed: int, positions: Sequence[int], samples_per_step: int) -> np.ndarray:
    """One number in [0, 1) per global sample position: one in each stratum of a step, on a lattice, or each on its own."""
    if spread == "lattice":
        return lattice_uniform(seed, positions, samples_per_step)
    return stratified_uniform(seed, positions, samples_per_step if spread == "strata" else 1)


def draw_timesteps(
    seed: int, positions: Sequence[int], samples_per_step: int, probabilities: Probabilities | None = None, *, spread: Spread = "strata"
) -> Tensor:
    """Training timesteps of global sample positions, (B,) int64, spread over each optimizer step; uniform without `probabilities`."""
    uniform = spread_uniform(spread, seed, positions, samples_per_step)
    if probabilities is None:
        return torch.from_numpy(np.floor(NUM_TIMESTEPS * uniform).astype(np.int64))
    return torch.from_numpy(inverse_cdf(probabilities, uniform))


def inverse_cdf(probabilities: Probabilities, uniform: np.ndarray) -> npt.NDArray[np.int64]:
    """The first timestep with more than `uniform` of the probability up to and with it; so a stratum of `uniform` becomes one of them."""
    cumulative = np.cumsum(probabilities)
    found = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
    return found.astype(np.int64)


def trailing_timesteps(num_steps: int) -> list[int]:
    """Sampling timesteps, falling, evenly spaced from 999: ten give 999, 899, …, 99 (arXiv 2305.08891, section 3.3).

    Raises ValueError outside 1..1000.
    """
    if not 1 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"sampling takes 1 to {NUM_TIMESTEPS} steps, got {num_steps}")
    return [round(NUM_TIMESTEPS * remaining / num_steps) - 1 for remaining in range(num_steps, 0, -1)]


def midpoint_timesteps(num_timesteps: int, *, terminal: bool) -> list[int]:
    """Validation timesteps, rising: the middles of equal strata (eight give 62, 187, …, 937), and 999 too if `terminal`."""
    middles = [(2 * stratum + 1) * NUM_TIMESTEPS // (2 * num_timesteps) for stratum in range(num_timesteps)]
    return [*middles, NUM_TIMESTEPS - 1] if terminal else middles
