"""From noise to pictures, over any denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from aquatint.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x_t, timestep) -> (x0, epsilon): what is left when the noise is taken away, and that noise."""


def euler(denoise: Denoiser, noise: Tensor, schedule: Schedule, timesteps: Sequence[int]) -> Tensor:
    """Latents x0 from unit noise (B, C, H, W) along falling timesteps; the last step returns its x0.

    x <- alpha' x0 + sigma' e, the step of DDIM (arXiv 2010.02502, equation 12 without its noise). Divided by alpha' it is Euler's
    step x0 + ve_sigma' e on the probability flow ODE (arXiv 2206.00364, algorithm 1 without its correction), but it needs no
    finite ve_sigma: at zero terminal SNR, t = 999, it is the exact step from infinity.
    """
    x = schedule.sigmas[timesteps[0]] * noise
    for now, following in pairwise(timesteps):
        x0, epsilon = denoise(x, now)
        x = schedule.alphas[following] * x0 + schedule.sigmas[following] * epsilon
    return denoise(x, timesteps[-1])[0]
