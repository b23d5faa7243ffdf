"""Sampling grids: the noise levels that a sampler stops at, from the noisiest down. The step from the last one to 0 is implied.

A grid is a list of falling timesteps, which may lie between the table's; `Schedule.levels` gives their noise.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from aquatint.diffusion.schedule import NUM_TIMESTEPS, Schedule
from aquatint.diffusion.timesteps import trailing_timesteps

Grid = Literal["trailing", "leading", "sgm_uniform", "karras", "exponential"]
Sigmas = npt.NDArray[np.float64]

GRIDS: tuple[Grid, ...] = get_args(Grid)
KARRAS_RHO = 7.0


def sampling_timesteps(grid: Grid, schedule: Schedule, num_steps: int, *, rho: float = KARRAS_RHO) -> list[float]:
    """The falling timesteps of a grid over a schedule.

    Raises ValueError for `leading` with zero terminal SNR, which it never starts from; for `karras` and `exponential` where the
    last ve_sigma is infinite, see `Schedule.ending_at`; and for a number of steps outside 1..1000.
    """
    if grid == "trailing":
        return [float(timestep) for timestep in trailing_timesteps(num_steps)]
    if grid == "sgm_uniform":
        return sgm_uniform_timesteps(num_steps)
    if grid == "leading":
        if schedule.zero_terminal_snr:
            raise ValueError("a leading grid never starts from pure noise, which this schedule ends in: take a trailing one")
        return [float(timestep) for timestep in leading_timesteps(num_steps)]
    ve_sigmas = schedule.ve_sigmas
    if ve_sigmas[-1].isinf():
        raise ValueError(f"a {grid} grid cannot be spaced from infinity: take a trailing one, or `Schedule.ending_at` a finite ve_sigma")
    lowest, highest = ve_sigmas[0].item(), ve_sigmas[-1].item()
    wanted = karras_sigmas(num_steps, lowest, highest, rho) if grid == "karras" else exponential_sigmas(num_steps, lowest, highest)
    timesteps: list[float] = schedule.timesteps_of(torch.from_numpy(wanted)).tolist()
    return timesteps


def leading_timesteps(num_steps: int) -> list[int]:
    """Evenly spaced timesteps that end at 1: what SDXL's own pipelines use; ten begin at 901 (arXiv 2305.08891, table 2)."""
    _check(num_steps)
    spacing = NUM_TIMESTEPS // num_steps
    offset = 0 if num_steps == NUM_TIMESTEPS else 1  # all thousand leave no room for it
    return [index * spacing + offset for index in reversed(range(num_steps))]


def sgm_uniform_timesteps(num_steps: int) -> list[float]:
    """Evenly spaced from 999 towards 0, which is left out; not rounded. (The spacing that samplers call `sgm_uniform`.)"""
    _check(num_steps)
    return [(NUM_TIMESTEPS - 1) * remaining / num_steps for remaining in range(num_steps, 0, -1)]


def karras_sigmas(num_steps: int, lowest: float, highest: float, rho: float = KARRAS_RHO) -> Sigmas:
    """Falling ve_sigmas, evenly spaced in their rho-th root (arXiv 2206.00364, equation 5)."""
    _check(num_steps)
    roots: Sigmas = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), num_steps)
    return _with_ends(roots**rho, lowest, highest)


def exponential_sigmas(num_steps: int, lowest: float, highest: float) -> Sigmas:
    """Falling ve_sigmas, evenly spaced in their logarithm."""
    _check(num_steps)
    logs: Sigmas = np.linspace(np.log(highest), np.log(lowest), num_steps)
    return _with_ends(np.exp(logs), lowest, highest)


def _with_ends(ve_sigmas: Sigmas, lowest: float, highest: float) -> Sigmas:
    """Exact ends: a root and a power, or a logarithm and its inverse, would miss them by a digit."""
    ve_sigmas[-1] = lowest
    ve_sigmas[0] = highest
    return ve_sigmas


def _check(num_steps: int) -> None:
    if not 1 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"sampling takes 1 to {NUM_TIMESTEPS} steps, got {num_steps}")
