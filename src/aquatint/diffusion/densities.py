"""How often each timestep is trained.

A density is a table of 1000 probabilities. It is made of a family's distribution function, taken at the edges of 1000 cells; what comes
after (a tilt, a range, a share of uniform draws, more of the last timestep) changes the table. `timesteps.draw_timesteps` draws
from it by the inverse of its cumulative sum, so that stratified draws stay stratified whatever the density.

"uniform", "logit_normal", "mode" and "cosmap" are over t, the place in the table divided by 1000, which for a flow is its time.
"log_normal" and "cosine" are over the noise level ve_sigma itself.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from aquatint.diffusion.schedule import NUM_TIMESTEPS, Schedule
from aquatint.diffusion.timesteps import Probabilities

Density = Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal", "cosine"]
Array = npt.NDArray[np.float64]

DENSITIES: tuple[Density, ...] = get_args(Density)
OVER_SIGMA: tuple[Density, ...] = ("log_normal", "cosine")
MODE_SCALES = (-1.0, 2 / (math.pi - 2))


def density(
    name: Density,
    schedule: Schedule,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
    sigma_data: float = 1.0,
    shift: float = 1.0,
    tilt: float = 1.0,
    lowest: int = 0,
    highest: int = NUM_TIMESTEPS - 1,
    uniform_share: float = 0.0,
    terminal_prob: float = 0.0,
) -> Probabilities:
    """The probability of each timestep, (1000,) float64 with a sum of 1.

    `mean` and `std` are those of the logit of t for logit_normal, and of ln(ve_sigma) for log_normal. `shift` moves t towards noise as
    `schedule.shifted` does, for the densities over t. `tilt` is the `schedule.resolution_factor` of the picture. Only timesteps
    `lowest … highest` are drawn: of all draws a share `uniform_share` evenly among them, and `terminal_prob` at the last of them.
    Raises ValueError for an empty range, a mode_scale outside of -1 … 1.75, or a range without probability.
    """
    if name in OVER_SIGMA:
        cumulative = sigma_cdf(name, sigma_edges(schedule), mean=mean, std=std, sigma_data=sigma_data)
    else:
        times = _unshifted(np.arange(NUM_TIMESTEPS + 1) / NUM_TIMESTEPS, shift)
        cumulative = time_cdf(name, times, mean=mean, std=std, mode_scale=mode_scale)
    probabilities = tilted(np.diff(cumulative), schedule, tilt)
    return within(probabilities, lowest, highest, uniform_share=uniform_share, terminal_prob=terminal_prob)


def within(
    probabilities: Probabilities, lowest: int, highest: int, *, uniform_share: float = 0.0, terminal_prob: float = 0.0
) -> Probabilities:
    """The density on timesteps `lowest … highest` alone, with a share of even draws, and more draws of the last. Raises as `density`."""
    if not 0 <= lowest <= highest < NUM_TIMESTEPS:
        raise ValueError(f"a range of timesteps must rise within 0 … {NUM_TIMESTEPS - 1}, got {lowest} … {highest}")
    inside, last = np.zeros((2, NUM_TIMESTEPS))
    inside[lowest : highest + 1] = 1
    last[highest] = 1
    if not probabilities @ inside > 0:
        raise ValueError(f"this density never draws a timestep in {lowest} … {highest}")
    mixed = (1 - uniform_share) * probabilities * inside / (probabilities @ inside) + uniform_share * inside / inside.sum()
    result: Probabilities = (1 - terminal_prob) * mixed + terminal_prob * last
    return result


def time_cdf(name: Density, t: Array, *, mean: float = 0.0, std: float = 1.0, mode_scale: float = 1.29) -> Array:
    """The share of draws below t in [0, 1] (arXiv 2403.03206)."""
    if name == "logit_normal":
        return _normal_cdf((_logit(t) - mean) / std)
    if name == "mode":
        return _mode_cdf(t, mode_scale)
    if name == "cosmap":
        share: Array = 2 / math.pi * np.arctan2(t, 1 - t)  # the integral of 2 / (pi (1 - 2 t + 2 t^2))
        return share
    return t


def mode_quantile(u: Array, scale: float) -> Array:
    """The t of a uniform draw u: 1 - u - s (cos^2(pi u / 2) - 1 + u), falling in u (arXiv 2403.03206, equation 20)."""
    t: Array = 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return t


def sigma_cdf(name: Density, ve_sigmas: Array, *, mean: float = 0.0, std: float = 1.0, sigma_data: float = 1.0) -> Array:
    """The share of draws below a ve_sigma in [0, inf].

    log_normal: ln(ve_sigma) is N(mean, std^2) (arXiv 2206.00364, table 1: -1.2 and 1.2, for data of spread 0.5; arXiv 2312.02696: -0.4
    and 1.0). cosine: ve_sigma = sigma_data tan(pi u / 2), the cosine schedule's (arXiv 2102.09672), uniform in its angle.
    """
    if name == "log_normal":
        with np.errstate(divide="ignore"):
            return _normal_cdf((np.log(ve_sigmas) - mean) / std)
    share: Array = 2 / math.pi * np.arctan(ve_sigmas / sigma_data)
    return share


def sigma_edges(schedule: Schedule) -> Array:
    """Rising ve_sigmas (1001,) with each timestep's between two of them; the first and last timestep's own are the ends."""
    times = _times(schedule)
    inner = _edges(times).clip(times[0], times[-1])
    with np.errstate(divide="ignore"):
        edges: Array = inner / (1 - inner)
    return edges


def tilted(probabilities: Probabilities, schedule: Schedule, factor: float) -> Probabilities:
    """The same density over noise levels that are `factor` times as large, on the timesteps that are there.

    So larger pictures are trained with the noise they need, and every timestep keeps its noise (arXiv 2301.11093, 2403.03206). A level
    moves as a flow's time does, (s' - s0) / (s1 - s') = k (s - s0) / (s1 - s) between the ve_sigmas s0 and s1 at the table's ends; where
    s1 is infinite, that is s' - s0 = k (s - s0). Both ends stay, so no timestep is left out.
    """
    edges = _edges(_times(schedule))
    places = (edges - edges[0]) / (edges[-1] - edges[0])
    cumulative = np.concatenate([[0.0], np.cumsum(probabilities)])
    moved: Probabilities = np.diff(np.interp(_unshifted(places, factor), places, cumulative))
    return moved


def _times(schedule: Schedule) -> Array:
    """Rising flow times sigma / (alpha + sigma), (1000,): finite also where the SNR is 0."""
    times: Array = (schedule.sigmas / (schedule.alphas + schedule.sigmas)).numpy()
    return times


def _edges(values: Array) -> Array:
    """What lies half-way between values, and as far beyond the ends: one more than there are values."""
    middles = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])


def _unshifted(t: Array, shift: float) -> Array:
    """The t that `schedule.shifted` brings here."""
    return t / (shift - (shift - 1) * t)


def _mode_cdf(t: Array, scale: float) -> Array:
    """The inverse of `mode_quantile`, by bisection."""
    if not MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
        raise ValueError(f"mode_scale must be in {MODE_SCALES[0]:g} … {MODE_SCALES[1]:.4f}, got {scale}: outside it counts some t twice")
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = mode_quantile(middle, scale) > t
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    share: Array = 1 - (low + high) / 2
    return share


def _logit(t: Array) -> Array:
    with np.errstate(divide="ignore"):
        logit: Array = np.log(t) - np.log1p(-t)
    return logit


def _normal_cdf(x: Array) -> Array:
    share: Array = torch.special.ndtr(torch.from_numpy(x)).numpy()
    return share
