"""The noise schedule: how much picture and how much noise each timestep holds.

Three spellings of a noise level. Variance preserving (VP): x_t = alpha x0 + sigma e with alpha^2 + sigma^2 = 1, which the UNet of
SDXL sees. Variance exploding (VE): x = x0 + ve_sigma e with ve_sigma = sigma / alpha, which samplers like to quote. Rectified
flow: x_t = (1 - t) x0 + t e. A level is found by its place in a table of 1000; between two places it is interpolated, in the
logarithm of ve_sigma, or in t itself for a flow.
Tables are float64 and what leaves them is float32: in half precision the first timesteps would all be the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
RESCALED_ALPHA_BAR = 1e-6  # SDXL's own table ends at 4.7e-3; a rescaled one at 0, or at a stand-in such as 4.9e-8 or 2**-24
STAND_INS = {"novelai": 20000.0, "comfyui": 4518.7637, "diffusers": 4096.0}
"""The finite ve_sigma that samplers of other programs put in the place of infinity. Never used to train."""
REFERENCE_AREA_PX = 1024 * 1024


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = alphas[t] * x0 + sigmas[t] * noise, for t = 0 (almost clean) to 999 (almost or exactly noise)."""

    alphas: Tensor
    """(1000,) float64, falling"""
    sigmas: Tensor
    """(1000,) float64, rising"""
    zero_terminal_snr: bool
    """Whether alphas[999] is exactly 0."""
    conditioning: Tensor | None = None
    """(1000,) float64: what the UNet is told in place of the timestep; None where it is told the timestep itself."""
    flow: bool = False
    """Whether alpha + sigma is 1, and not alpha^2 + sigma^2."""

    @property
    def snr(self) -> Tensor:
        """Signal to noise ratio alpha^2 / sigma^2, (1000,) float64; exactly 0 at the end with zero terminal SNR."""
        return (self.alphas / self.sigmas).square()

    @property
    def ve_sigmas(self) -> Tensor:
        """Noise level sigma / alpha of the variance exploding form, (1000,) float64; infinite where the SNR is 0."""
        return self.sigmas / self.alphas

    @cached_property
    def float_levels(self) -> Tensor:
        """Alphas and sigmas, (2, 1000) float32."""
        return torch.stack([self.alphas, self.sigmas]).float()

    def to(self, device: torch.device) -> Schedule:
        """The schedule with its tables on a device, where steps look levels up without a copy."""
        told = None if self.conditioning is None else self.conditioning.to(device)
        return replace(self, alphas=self.alphas.to(device), sigmas=self.sigmas.to(device), conditioning=told)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of a batch of timesteps (B,), each float32 (B, 1, 1, 1) on their device.

        int64 timesteps are looked up. Timesteps of a float type may lie between two: see the module.
        Raises ValueError for one between the last finite ve_sigma and infinity, where nothing can be interpolated.
        """
        if timesteps.is_floating_point():
            alpha, sigma = (level.float() for level in self.levels(timesteps))
        else:
            alpha, sigma = self.float_levels.to(timesteps.device)[:, timesteps]
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of timesteps of any shape and any type, float64, of their shape."""
        alphas, sigmas = (table.to(timesteps.device) for table in (self.alphas, self.sigmas))
        if self.flow:
            sigma = _interpolate(sigmas, timesteps)
            return 1 - sigma, sigma
        alpha, sigma = _variance_preserving(_interpolate(self.ve_sigmas.log().to(timesteps.device), timesteps).exp())
        whole = timesteps.round().long().clamp(0, NUM_TIMESTEPS - 1)
        alpha, sigma = (torch.where(whole == timesteps, table[whole], level) for table, level in ((alphas, alpha), (sigmas, sigma)))
        if sigma.isnan().any():
            raise ValueError("between the last two timesteps there is no noise level: the last is infinite; see `ending_at`")
        return alpha, sigma

    def unet_timesteps(self, timesteps: Tensor) -> Tensor:
        """What the UNet is told about the noise level of each timestep (B,): the timestep, or float32 from `conditioning`."""
        if self.conditioning is None:
            return timesteps
        told = self.conditioning.to(timesteps.device)
        return (_interpolate(told, timesteps) if timesteps.is_floating_point() else told[timesteps]).float()

    def timesteps_of(self, ve_sigmas: Tensor) -> Tensor:
        """The timesteps, float64, that have these ve_sigmas, interpolated like `at`; those beyond the table's ends get its ends.

        (k-diffusion's `sigma_to_t`.) A finite ve_sigma above the last finite one of the table gets the timestep of that one.
        """
        if self.flow:
            table, wanted = self.sigmas, ve_sigmas / (1 + ve_sigmas)
            wanted = torch.where(ve_sigmas.isinf(), 1.0, wanted)
        else:
            table, wanted = self.ve_sigmas.log(), ve_sigmas.double().log()
        finite = int(table.isfinite().sum())
        found = np.interp(wanted.double().cpu().numpy(), table[:finite].cpu().numpy(), np.arange(finite, dtype=np.float64))
        timesteps = torch.from_numpy(np.asarray(found)).to(ve_sigmas.device)
        return torch.where(ve_sigmas.isinf(), float(NUM_TIMESTEPS - 1), timesteps)

    def ending_at(self, ve_sigma: float) -> Schedule:
        """This zero terminal SNR schedule with a finite ve_sigma in the place of infinity: for sampling grids that need a number.

        See STAND_INS. Raises ValueError for a schedule that has none to replace, or a ve_sigma below the one before it.
        """
        if not self.zero_terminal_snr or self.flow:
            raise ValueError("only a schedule that ends at an infinite ve_sigma takes another in its place")
        if not self.ve_sigmas[-2] < ve_sigma < float("inf"):
            raise ValueError(f"the last ve_sigma must be finite and above {self.ve_sigmas[-2]:.6g}, got {ve_sigma}")
        alpha, sigma = _variance_preserving(torch.tensor([ve_sigma], dtype=torch.float64))
        alphas, sigmas = torch.cat([self.alphas[:-1], alpha]), torch.cat([self.sigmas[:-1], sigma])
        return replace(self, alphas=alphas, sigmas=sigmas, zero_terminal_snr=False)


def sdxl_schedule(*, zero_terminal_snr: bool) -> Schedule:
    """The schedule SDXL was trained with (arXiv 2307.01952), or the same one stretched to end in pure noise."""
    alpha_bar = torch.cumprod(1 - sdxl_betas(), dim=0)
    if zero_terminal_snr:
        alpha_bar = rescale_zero_terminal_snr(alpha_bar)
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), zero_terminal_snr)  # in float64 the difference keeps 13 digits


def flow_schedule(shift: float = 1.0) -> Schedule:
    """Rectified flow (arXiv 2209.03003): alpha = 1 - t, sigma = t at t = 0.001, 0.002, …, 1; the UNet is told 1000 t.

    `shift` moves every level towards noise, see `shifted`: for training it changes how often a level comes, for sampling how the
    steps are shared out. The last level is pure noise, so `zero_terminal_snr` is true.
    """
    t = shifted(torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS, shift)
    return Schedule(1 - t, t, zero_terminal_snr=True, conditioning=NUM_TIMESTEPS * t, flow=True)


def edm_schedule(lowest: float = 0.002, highest: float = 80.0) -> Schedule:
    """Levels of checkpoints that name their noise by c_noise = ln(ve_sigma) / 4 (arXiv 2206.00364, table 1).

    The table is even in that number; the UNet is told it, and not a timestep. 0.002 to 80 are the paper's; CosXL ends at 120.
    """
    log_ve_sigmas = torch.linspace(np.log(lowest), np.log(highest), NUM_TIMESTEPS, dtype=torch.float64)
    alphas, sigmas = _variance_preserving(log_ve_sigmas.exp())
    return Schedule(alphas, sigmas, zero_terminal_snr=False, conditioning=log_ve_sigmas / 4)


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


def resolution_factor(height_px: int, width_px: int, reference_area_px: int = REFERENCE_AREA_PX) -> float:
    """How much stronger noise must be to hide as much of a larger picture: k = sqrt(area / 1024^2) (arXiv 2301.11093).

    Twice the side shows each thing in four times the pixels, which average its noise down by two.
    """
    return float((height_px * width_px / reference_area_px) ** 0.5)


def reindexed(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with every ve_sigma `factor` times as large, at the timesteps of the old ones.

    For a flow it is `shifted`, and the UNet is told the new levels. Elsewhere the UNet is told the old timesteps for other noise:
    no other program samples SDXL so. To tilt how often each timestep comes (`densities.tilted`) does the same for the training.
    """
    if schedule.flow:
        t = shifted(schedule.sigmas, factor)
        return replace(schedule, alphas=1 - t, sigmas=t, conditioning=NUM_TIMESTEPS * t)
    norm = torch.hypot(schedule.alphas, factor * schedule.sigmas)
    return replace(schedule, alphas=schedule.alphas / norm, sigmas=factor * schedule.sigmas / norm)


def shifted(t: Tensor, shift: float) -> Tensor:
    """k t / (1 + (k - 1) t): the time t of a flow at which ve_sigma is k times as large (arXiv 2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents x_t = alpha x0 + sigma e, (B, C, H, W) float32; alpha and sigma come from `Schedule.at`."""
    return alpha * latents.float() + sigma * noise.float()


def _variance_preserving(ve_sigmas: Tensor) -> tuple[Tensor, Tensor]:
    alphas = (1 + ve_sigmas.square()).rsqrt()
    return alphas, ve_sigmas * alphas


def _interpolate(table: Tensor, timesteps: Tensor) -> Tensor:
    """Values of a (1000,) table between its places, float64."""
    places = timesteps.double().clamp(0, NUM_TIMESTEPS - 1)
    low = places.long().clamp(max=NUM_TIMESTEPS - 2)
    share = places - low
    return (1 - share) * table[low] + share * table[low + 1]  # exact at both ends
