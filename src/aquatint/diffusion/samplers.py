"""From noise to pictures, over any denoiser.

Samplers are usually written for x = x0 + ve_sigma e (arXiv 2206.00364). Here x_t = alpha x0 + sigma e, which is that times alpha: so a
step can start where ve_sigma is infinite, at zero terminal SNR, and be exact there. Each takes falling timesteps, such as those of
`grids`, and ends with the x0 of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from aquatint.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(x_t, timestep) -> (x0, epsilon): what is left when the noise is taken away, and that noise."""
FreshNoise = Callable[[int], Tensor]
"""Step, from 0 -> unit noise (B, C, H, W) that no other step gets."""
Sampler = Literal["euler", "heun", "dpmpp_2m", "euler_ancestral"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


class _Level(NamedTuple):
    """One noise level: float64 numbers without dimensions."""

    timestep: float
    alpha: Tensor
    sigma: Tensor

    @property
    def ve_sigma(self) -> Tensor:
        return self.sigma / self.alpha


def sample(
    sampler: Sampler, denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[float], fresh: FreshNoise | None = None
) -> Tensor:
    """Latents x0 by a sampler's name. Raises ValueError for euler_ancestral without `fresh`."""
    if sampler == "euler":
        return euler(denoise, noise, schedule, timesteps)
    if sampler == "heun":
        return heun(denoise, noise, schedule, timesteps)
    if sampler == "dpmpp_2m":
        return dpmpp_2m(denoise, noise, schedule, timesteps)
    if fresh is None:
        raise ValueError("euler_ancestral adds noise at every step, and was given none")
    return euler_ancestral(denoise, noise, schedule, timesteps, fresh)


def euler(denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[float]) -> Tensor:
    """Latents x0 from unit noise (B, C, H, W) along falling timesteps; the last step returns its x0.

    x <- alpha' x0 + sigma' e, the step of DDIM (arXiv 2010.02502, equation 12 without its noise). Divided by alpha' it is Euler's
    step x0 + ve_sigma' e on the probability flow ODE (arXiv 2206.00364, algorithm 1 without its correction), but it needs no
    finite ve_sigma: at zero terminal SNR, t = 999, it is the exact step from infinity.
    """
    levels = _levels(schedule, timesteps)
    x = levels[0].sigma * noise
    for now, after in pairwise(levels):
        x0, epsilon = denoise(x, now.timestep)
        x = after.alpha * x0 + after.sigma * epsilon
    return denoise(x, levels[-1].timestep)[0]


def heun(denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[float]) -> Tensor:
    """As `euler`, each step but the last corrected by a look at where it leads: 2 n - 1 calls (arXiv 2206.00364, algorithm 1).

    The mean of both slopes is taken in ve_sigma. From an infinite one, and for a flow, it is taken in alpha and sigma instead:
    x' = x + (alpha' - alpha) (x0 + x0') / 2 + (sigma' - sigma) (e + e') / 2, of the same order, and for a flow Heun's step in its t.
    """
    levels = _levels(schedule, timesteps)
    x = levels[0].sigma * noise
    for now, after in pairwise(levels):
        x0, epsilon = denoise(x, now.timestep)
        next_x0, next_epsilon = denoise(after.alpha * x0 + after.sigma * epsilon, after.timestep)
        if schedule.flow or now.alpha == 0:
            x = x + (after.alpha - now.alpha) / 2 * (x0 + next_x0) + (after.sigma - now.sigma) / 2 * (epsilon + next_epsilon)
        else:
            bend = after.alpha * (after.ve_sigma - now.ve_sigma) / 2
            x = after.alpha * x0 + after.sigma * epsilon + bend * (next_epsilon - epsilon)
    return denoise(x, levels[-1].timestep)[0]


def dpmpp_2m(denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): Euler's step, with x0 carried on along its last change.

    The steps are measured in ln ve_sigma. The first one has no change to carry on. Nor has the second, if the first came from
    infinity: beside that step it has no length.
    """
    levels = _levels(schedule, timesteps)
    x = levels[0].sigma * noise
    last_x0, last_step = None, torch.tensor(float("inf"), dtype=torch.float64)
    for now, after in pairwise(levels):
        x0, epsilon = denoise(x, now.timestep)
        step = now.ve_sigma.log() - after.ve_sigma.log()
        x = after.alpha * x0 + after.sigma * epsilon
        if last_x0 is not None and last_step.isfinite():
            x = x + after.alpha * (1 - after.ve_sigma / now.ve_sigma) * step / (2 * last_step) * (x0 - last_x0)
        last_x0, last_step = x0, step
    return denoise(x, levels[-1].timestep)[0]


def euler_ancestral(
    denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[float], fresh: FreshNoise, *, eta: float = 1.0
) -> Tensor:
    """As `euler`, but a part of each level's noise is new: with eta 1 as much as the forward process would add (k-diffusion's sampler).

    x <- alpha' x0 + sigma' (down e + up n) with up^2 = eta^2 (1 - (ve_sigma' / ve_sigma)^2), at most 1, and down^2 = 1 - up^2. From an
    infinite ve_sigma all of the noise is new.
    """
    levels = _levels(schedule, timesteps)
    x = levels[0].sigma * noise
    for index, (now, after) in enumerate(pairwise(levels)):
        x0, epsilon = denoise(x, now.timestep)
        up = (eta * (1 - (after.ve_sigma / now.ve_sigma).square()).sqrt()).clamp(max=1)
        down = (1 - up.square()).sqrt()
        x = after.alpha * x0 + after.sigma * (down * epsilon + up * fresh(index))
    return denoise(x, levels[-1].timestep)[0]


def _levels(schedule: Schedule, timesteps: Sequence[float]) -> list[_Level]:
    alphas, sigmas = schedule.levels(torch.tensor(timesteps))
    return [_Level(timestep, alpha, sigma) for timestep, alpha, sigma in zip(timesteps, alphas, sigmas, strict=True)]
