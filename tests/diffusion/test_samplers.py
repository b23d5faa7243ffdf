import pytest
import torch

from aquatint.diffusion.parameterization import target, to_epsilon, to_x0
from aquatint.diffusion.samplers import Denoiser, euler
from aquatint.diffusion.schedule import Schedule, sdxl_schedule
from aquatint.diffusion.timesteps import trailing_timesteps

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
SCHEDULES = pytest.mark.parametrize("schedule", [PLAIN, ZERO_TERMINAL], ids=["plain", "zero_terminal_snr"])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser_of_gaussian(schedule: Schedule, std: float) -> Denoiser:
    """The perfect denoiser of data from N(0, std^2): E[x0 | x_t] = alpha std^2 x_t / (alpha^2 std^2 + sigma^2)."""

    def denoise(x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = schedule.alphas[timestep].item(), schedule.sigmas[timestep].item()
        variance = (alpha * std) ** 2 + sigma**2
        return alpha * std**2 / variance * x, sigma / variance * x

    return denoise


def toy_unet(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """Smooth, not linear, and different at every timestep."""
    return torch.tanh(0.7 * x + timestep / 1000) - 0.3 * torch.sin(x)


@SCHEDULES
@pytest.mark.parametrize("num_steps", [1, 2, 28])
def test_a_perfect_denoiser_of_one_picture_recovers_it(schedule, num_steps):
    picture, noise = randn(0, 1, 4, 8, 8), randn(1, 1, 4, 8, 8)

    def denoise(x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        return picture, (x - schedule.alphas[timestep] * picture) / schedule.sigmas[timestep]

    torch.testing.assert_close(euler(denoise, noise, schedule, trailing_timesteps(num_steps)), picture)


def test_the_path_to_one_picture_is_straight_from_zero_terminal_snr():
    picture, noise = randn(0, 1, 4, 8, 8), randn(1, 1, 4, 8, 8)
    visited: list[int] = []

    def denoise(x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = ZERO_TERMINAL.at(torch.tensor([timestep]))
        torch.testing.assert_close(x, alpha * picture + sigma * noise, rtol=0, atol=1e-5)
        v = target("v_prediction", picture, noise, alpha, sigma)
        visited.append(timestep)
        return to_x0("v_prediction", v, x, alpha, sigma), to_epsilon("v_prediction", v, x, alpha, sigma)

    torch.testing.assert_close(euler(denoise, noise, ZERO_TERMINAL, trailing_timesteps(10)), picture, rtol=0, atol=1e-5)
    assert visited == trailing_timesteps(10)


def test_the_first_step_at_zero_terminal_snr_is_the_step_from_infinity():
    """In the variance exploding form: x_1 = sigma_1 n - F(n), as the limit of Euler's step from sigma -> infinity."""
    noise, timesteps = randn(0, 1, 4, 8, 8), trailing_timesteps(10)
    states: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        states.append(x)
        alpha, sigma = ZERO_TERMINAL.at(torch.tensor([timestep]))
        return tuple(convert("v_prediction", toy_unet(x, timestep), x, alpha, sigma) for convert in (to_x0, to_epsilon))

    euler(denoise, noise, ZERO_TERMINAL, timesteps)
    assert torch.equal(states[0], noise)
    ve_sigma = ZERO_TERMINAL.ve_sigmas[timesteps[1]]
    expected = (ve_sigma * noise - toy_unet(noise, 999)) / (1 + ve_sigma**2).sqrt()
    torch.testing.assert_close(states[1], expected, rtol=1e-5, atol=1e-6)


@SCHEDULES
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_many_steps_turn_noise_into_the_spread_of_the_data(schedule, std):
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    made = euler(denoiser_of_gaussian(schedule, std), noise, schedule, trailing_timesteps(1000))
    assert made.item() == pytest.approx(std, rel=0.03)


def test_more_steps_come_closer_to_the_spread_of_the_data():
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    denoise = denoiser_of_gaussian(ZERO_TERMINAL, 0.5)
    errors = [abs(euler(denoise, noise, ZERO_TERMINAL, trailing_timesteps(n)).item() - 0.5) for n in (10, 50, 250)]
    assert errors[0] > errors[1] > errors[2]


def test_latents_stay_float32_beside_float64_tables():
    made = euler(denoiser_of_gaussian(PLAIN, 1.0), randn(0, 2, 4, 3, 5), PLAIN, trailing_timesteps(4))
    assert made.dtype == torch.float32
    assert made.shape == (2, 4, 3, 5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, on new numpy versions
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_agrees_with_diffusers(prediction):
    from diffusers import EulerDiscreteScheduler

    noise = randn(0, 1, 4, 8, 8)

    def denoise(x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = PLAIN.at(torch.tensor([timestep]))
        return tuple(convert(prediction, toy_unet(x, timestep), x, alpha, sigma) for convert in (to_x0, to_epsilon))

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(12)
    assert theirs.timesteps.long().tolist() == trailing_timesteps(12)
    x = noise * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        x = theirs.step(toy_unet(theirs.scale_model_input(x, timestep), int(timestep)), timestep, x).prev_sample
    torch.testing.assert_close(euler(denoise, noise, PLAIN, trailing_timesteps(12)), x, rtol=1e-4, atol=1e-4)
