"""The noise schedule of SDXL: how much picture and how much noise each timestep holds.

Two spellings of the same table: variance preserving (VP), x_t = alpha x0 + sigma e with alpha^2 + sigma^2 = 1, which the UNet
sees; and variance exploding (VE), x = x0 + ve_sigma e with ve_sigma = sigma / alpha, which samplers like to quote.
Tables are float64 and what leaves them is float32: in half precision the first timesteps would all be the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
RESCALED_ALPHA_BAR = 1e-6  # SDXL's own table ends at 4.7e-3; a rescaled one at 0, or at a stand-in such as 4.9e-8 or 2**-24


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = alphas[t] * x0 + sigmas[t] * noise, for t = 0 (almost clean) to 999 (almost or exactly noise)."""

    alphas: Tensor
    """(1000,) float64, falling"""
    sigmas: Tensor
    """(1000,) float64, rising"""
    zero_terminal_snr: bool
    """Whether alphas[999] is exactly 0."""

    @property
    def snr(self) -> Tensor:
        """Signal to noise ratio alpha^2 / sigma^2, (1000,) float64; exactly 0 at the end with zero terminal SNR."""
        return (self.alphas / self.sigmas).square()

    @property
    def ve_sigmas(self) -> Tensor:
        """Noise level sigma / alpha of the variance exploding form, (1000,) float64; infinite where the SNR is 0."""
        return self.sigmas / self.alphas

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of a batch of int64 timesteps (B,), each float32 (B, 1, 1, 1) on their device."""
        alpha, sigma = (table.float().to(timesteps.device)[timesteps] for table in (self.alphas, self.sigmas))
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def sdxl_schedule(*, zero_terminal_snr: bool) -> Schedule:
    """The schedule SDXL was trained with (arXiv 2307.01952), or the same one stretched to end in pure noise."""
    alpha_bar = torch.cumprod(1 - sdxl_betas(), dim=0)
    if zero_terminal_snr:
        alpha_bar = rescale_zero_terminal_snr(alpha_bar)
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), zero_terminal_snr)  # in float64 the difference keeps 13 digits


def sdxl_betas() -> Tensor:
    """Variance of the noise that each timestep adds, (1000,) float64: linear in its root ("scaled linear", arXiv 2112.10752)."""
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64).square()


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that it ends at exactly 0 and still starts where it did (arXiv 2305.08891, algorithm 1).

    Raises ValueError when the table has been rescaled already, also if a tiny number stands for its 0: twice is another table.
    """
    if alpha_bar[-1] < RESCALED_ALPHA_BAR:
        raise ValueError(f"this schedule has zero terminal SNR already: it ends at alpha_bar {alpha_bar[-1]:.3g}")
    alphas = alpha_bar.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * first / (first - last)).square()


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents x_t = alpha x0 + sigma e, (B, C, H, W) float32; alpha and sigma come from `Schedule.at`."""
    return alpha * latents.float() + sigma * noise.float()
