"""The same weights, noise and timesteps give the same losses as diffusers, in float32; and what its half precision path does instead."""

import pytest
import torch

from aquatint.diffusion.loss import per_sample_mse
from aquatint.diffusion.parameterization import target
from aquatint.diffusion.schedule import add_noise, sdxl_schedule

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
TIMESTEPS = torch.tensor([0, 1, 10, 100, 354, 500, 750, 998, 999])

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def theirs(zero_terminal_snr: bool):
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr)


def draws(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("schedule", "zero_terminal_snr"), [(PLAIN, False), (ZERO_TERMINAL, True)], ids=["plain", "zero_terminal_snr"])
def test_noisy_latents_targets_and_losses_agree_in_float32(schedule, zero_terminal_snr):
    latents, noise = draws(len(TIMESTEPS), 4, 16, 16)
    scheduler = theirs(zero_terminal_snr)
    alpha, sigma = schedule.at(TIMESTEPS)
    noisy, velocity = add_noise(latents, noise, alpha, sigma), target("v_prediction", latents, noise, alpha, sigma)
    # their tables are float32: products of up to a thousand roundings, and a rescaled one is the difference of two of them
    close = {"rtol": 0, "atol": 2e-5 if zero_terminal_snr else 5e-6}
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, TIMESTEPS), **close)
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, TIMESTEPS), **close)
    net = torch.nn.Conv2d(4, 4, 3, padding=1)
    for ours, other in [(noise, noise), (velocity, scheduler.get_velocity(latents, noise, TIMESTEPS))]:
        mine = per_sample_mse(net(noisy), ours)
        their = torch.nn.functional.mse_loss(net(scheduler.add_noise(latents, noise, TIMESTEPS)), other)
        assert mine.mean().item() == pytest.approx(their.item(), rel=1e-6 if not zero_terminal_snr else 3e-6)


def noise_levels_of(dtype: torch.dtype) -> torch.Tensor:
    """How much noise diffusers adds at each timestep to latents of this type."""
    ones, zeros = torch.ones(1000, 1, 1, 1, dtype=dtype), torch.zeros(1000, 1, 1, 1, dtype=dtype)
    return theirs(False).add_noise(zeros, ones, torch.arange(1000)).flatten().double()


def test_in_bfloat16_diffusers_forgets_the_first_noise_levels():
    """It rounds alpha_bar before it takes 1 - alpha_bar."""
    levels = noise_levels_of(torch.bfloat16)
    assert levels[:2].tolist() == [0, 0]
    assert len(levels[:100].unique()) == 28
    assert (levels / PLAIN.sigmas - 1).abs()[:50].mean().item() == pytest.approx(0.072, abs=1e-3)


def test_in_float16_diffusers_misses_the_second_noise_level_by_seven_percent():
    error = (noise_levels_of(torch.float16) / PLAIN.sigmas - 1).abs()
    assert [error.max().item(), int(error.argmax())] == [pytest.approx(0.073, abs=1e-3), 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ours_are_right_whatever_the_latents_are(dtype):
    ones, zeros = torch.ones(1000, 1, 1, 1, dtype=dtype), torch.zeros(1000, 1, 1, 1, dtype=dtype)
    torch.testing.assert_close(add_noise(zeros, ones, *PLAIN.at(torch.arange(1000))).flatten(), PLAIN.sigmas.float(), rtol=0, atol=0)
