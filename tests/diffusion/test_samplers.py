import pytest
import torch

from aquatint.diffusion.grids import sampling_timesteps
from aquatint.diffusion.parameterization import Prediction, target, to_epsilon, to_x0
from aquatint.diffusion.samplers import SAMPLERS, Denoiser, dpmpp_2m, euler, euler_ancestral, heun, sample
from aquatint.diffusion.schedule import STAND_INS, Schedule, flow_schedule, sdxl_schedule
from aquatint.diffusion.timesteps import trailing_timesteps

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
FLOW = flow_schedule()
EVERY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)
SCHEDULES = pytest.mark.parametrize("schedule", [PLAIN, ZERO_TERMINAL, FLOW], ids=["plain", "zero_terminal_snr", "flow"])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser_of_gaussian(schedule: Schedule, std: float) -> Denoiser:
    """The perfect denoiser of data from N(0, std^2): E[x0 | x_t] = alpha std^2 x_t / (alpha^2 std^2 + sigma^2)."""

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = (level.item() for level in schedule.levels(torch.tensor(timestep, dtype=torch.float64)))
        variance = (alpha * std) ** 2 + sigma**2
        return alpha * std**2 / variance * x, sigma / variance * x

    return denoise


def toy_unet(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """Smooth, not linear, and different at every timestep."""
    return torch.tanh(0.7 * x + timestep / 1000) - 0.3 * torch.sin(x)


def denoiser_of(prediction: Prediction, schedule: Schedule) -> Denoiser:
    """The toy net, told the timestep."""

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = schedule.at(torch.tensor([timestep]))
        return tuple(convert(prediction, toy_unet(x, timestep), x, alpha, sigma) for convert in (to_x0, to_epsilon))

    return denoise


def fresh(step: int) -> torch.Tensor:
    return randn(100 + step, 1, 4, 8, 8)


@EVERY_SAMPLER
@SCHEDULES
@pytest.mark.parametrize("num_steps", [1, 2, 28])
def test_a_perfect_denoiser_of_one_picture_recovers_it(sampler, schedule, num_steps):
    picture, noise = randn(0, 1, 4, 8, 8), randn(1, 1, 4, 8, 8)

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = schedule.levels(torch.tensor(timestep))
        return picture, (x - alpha * picture) / sigma

    torch.testing.assert_close(sample(sampler, denoise, noise, schedule, trailing_timesteps(num_steps), fresh), picture)


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


def made_from(sampler: str, schedule: Schedule) -> torch.Tensor:
    timesteps = sampling_timesteps("trailing", schedule, 10)
    return sample(sampler, denoiser_of("v_prediction", schedule), randn(0, 1, 4, 8, 8), schedule, timesteps, fresh)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_the_step_from_infinity_is_the_limit_of_steps_from_large_numbers(sampler):
    exact = made_from(sampler, ZERO_TERMINAL)
    torch.testing.assert_close(made_from(sampler, ZERO_TERMINAL.ending_at(1e7)), exact, rtol=0, atol=2e-4)


def test_the_limit_of_dpmpp_2m_is_approached_as_the_logarithm_grows():
    """Its second step carries x0 on by a share of 1 / ln(ve_sigma)."""
    exact = made_from("dpmpp_2m", ZERO_TERMINAL)
    errors = [(made_from("dpmpp_2m", ZERO_TERMINAL.ending_at(10.0**power)) - exact).abs().max().item() for power in (4, 10, 20)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


@EVERY_SAMPLER
def test_every_sampler_starts_from_infinity(sampler):
    assert made_from(sampler, ZERO_TERMINAL).isfinite().all()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@SCHEDULES
def test_errors_fall_with_the_order_of_the_sampler(sampler, order, schedule):
    """Halving all steps divides the error by 2 ** order, also from pure noise."""
    data_std = 0.5
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    denoise = denoiser_of_gaussian(schedule, data_std)
    first, last = (torch.hypot(schedule.alphas[t] * data_std, schedule.sigmas[t]) for t in (999, 99))  # what spreads x_t
    exact = schedule.sigmas[999] * noise / first * last
    exact = denoise(exact, 99)[0].item()  # all end with the same step to x0
    errors = [
        abs(sample(sampler, denoise, noise, schedule, torch.linspace(999, 99, steps, dtype=torch.float64).tolist()).item() - exact)
        for steps in (26, 51, 101)
    ]
    assert errors[0] / errors[1] > 2**order * 0.8
    assert errors[1] / errors[2] > 2**order * 0.8


def test_ancestral_steps_without_new_noise_are_eulers():
    noise, timesteps = randn(0, 1, 4, 8, 8), trailing_timesteps(12)
    denoise = denoiser_of("v_prediction", ZERO_TERMINAL)
    made = euler_ancestral(denoise, noise, ZERO_TERMINAL, timesteps, fresh, eta=0.0)
    assert torch.equal(made, euler(denoise, noise, ZERO_TERMINAL, timesteps))


def test_ancestral_steps_from_infinity_forget_the_first_noise():
    timesteps, denoise = trailing_timesteps(3), denoiser_of_gaussian(ZERO_TERMINAL, 0.0)
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x)
        return denoise(x, timestep)

    euler_ancestral(watched, randn(0, 1, 4, 8, 8), ZERO_TERMINAL, timesteps, fresh)
    torch.testing.assert_close(seen[1], ZERO_TERMINAL.sigmas[timesteps[1]] * fresh(0))


@pytest.mark.parametrize("schedule", [PLAIN, ZERO_TERMINAL], ids=["plain", "zero_terminal_snr"])
def test_ancestral_steps_keep_the_amount_of_noise(schedule):
    """Pictures of nothing: x_t is noise of strength sigma at every step."""
    denoise = denoiser_of_gaussian(schedule, 0.0)

    def watched(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.std().item() == pytest.approx(schedule.sigmas[int(timestep)].item(), rel=0.05)
        return denoise(x, timestep)

    euler_ancestral(watched, randn(0, 1, 4, 32, 32), schedule, trailing_timesteps(20), lambda step: randn(1 + step, 1, 4, 32, 32))


def test_ancestral_sampling_needs_its_noise():
    noise = randn(0, 1, 4, 8, 8)
    with pytest.raises(ValueError, match="was given none"):
        sample("euler_ancestral", denoiser_of("epsilon", PLAIN), noise, PLAIN, trailing_timesteps(3))


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 10), ("heun", 19), ("dpmpp_2m", 10), ("euler_ancestral", 10)])
def test_samplers_call_the_denoiser_so_often(sampler, calls):
    counted: list[float] = []

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        counted.append(timestep)
        return denoiser_of("epsilon", PLAIN)(x, timestep)

    sample(sampler, denoise, randn(0, 1, 4, 8, 8), PLAIN, trailing_timesteps(10), fresh)
    assert len(counted) == calls


def diffusers_scheduler(name: str, prediction: str, grid: str, num_steps: int):
    import diffusers

    spacing = {"trailing": {"timestep_spacing": "trailing"}, "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True}}[grid]
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **spacing
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, on new numpy versions
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grid", ["trailing", "karras"])
@pytest.mark.parametrize(("sampler", "name"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_samplers_over_noise_agree_with_diffusers(sampler, name, grid, prediction):
    noise, theirs = randn(0, 1, 4, 8, 8), diffusers_scheduler(name, prediction, grid, 12)
    x = noise * theirs.sigmas.max()
    for timestep in theirs.timesteps:
        x = theirs.step(toy_unet(theirs.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
    ours = sample(sampler, denoiser_of(prediction, PLAIN), noise, PLAIN, sampling_timesteps(grid, PLAIN, 12))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [12, 20])
def test_dpmpp_2m_agrees_with_diffusers(prediction, num_steps):
    noise, theirs = randn(0, 1, 4, 8, 8), diffusers_scheduler("DPMSolverMultistepScheduler", prediction, "trailing", num_steps)
    x = noise * PLAIN.sigmas[999]  # theirs starts from unit noise; the samplers that it is an alternative to start from this
    for timestep in theirs.timesteps:
        x = theirs.step(toy_unet(x, int(timestep)), timestep, x).prev_sample
    ours = dpmpp_2m(denoiser_of(prediction, PLAIN), noise, PLAIN, trailing_timesteps(num_steps))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_agrees_with_diffusers(prediction):
    noise, theirs = randn(0, 1, 4, 8, 8), diffusers_scheduler("EulerAncestralDiscreteScheduler", prediction, "trailing", 12)
    theirs.is_scale_input_called = True
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(noise.shape, generator=generator) for _ in range(12)]
    generator.manual_seed(7)
    x = noise * theirs.sigmas.max()
    for timestep in theirs.timesteps:
        x = theirs.step(toy_unet(theirs.scale_model_input(x, timestep), timestep), timestep, x, generator=generator).prev_sample
    ours = euler_ancestral(denoiser_of(prediction, PLAIN), noise, PLAIN, trailing_timesteps(12), lambda step: drawn[step])
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_is_k_diffusions_formula_between_any_noise_levels():
    """x <- (s' / s) x - expm1(-h) D_d with D_d = (1 + 1 / 2r) D - D_old / 2r, in x = x0 + ve_sigma e, on a grid that diffusers rounds."""
    schedule = ZERO_TERMINAL.ending_at(STAND_INS["comfyui"])
    timesteps, denoise = sampling_timesteps("karras", schedule, 15), denoiser_of("v_prediction", schedule)
    alphas, sigmas = schedule.levels(torch.tensor(timesteps, dtype=torch.float64))
    ve_sigmas = sigmas / alphas
    x, old, last_h = ve_sigmas[0] * randn(0, 1, 4, 8, 8).double(), None, None
    for i, timestep in enumerate(timesteps[:-1]):
        x0 = denoise(alphas[i] * x, timestep)[0]
        h = ve_sigmas[i].log() - ve_sigmas[i + 1].log()
        r = None if old is None else last_h / h
        carried = x0 if old is None else (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = ve_sigmas[i + 1] / ve_sigmas[i] * x - torch.expm1(-h) * carried
        old, last_h = x0, h
    expected = denoise(alphas[-1] * x, timesteps[-1])[0]
    torch.testing.assert_close(dpmpp_2m(denoise, randn(0, 1, 4, 8, 8).double(), schedule, timesteps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("sampler", "name"), [(euler, "FlowMatchEulerDiscreteScheduler"), (heun, "FlowMatchHeunDiscreteScheduler")])
def test_samplers_of_a_flow_agree_with_diffusers(sampler, name):
    import diffusers

    theirs = getattr(diffusers, name)(shift=1.0)
    theirs.set_timesteps(10)
    noise = x = randn(0, 1, 4, 8, 8)
    for timestep in theirs.timesteps:
        x = theirs.step(toy_unet(x, timestep), timestep, x).prev_sample
    grid = (1000 * theirs.sigmas[:-1].double().unique(sorted=True).flip(0) - 1).tolist()

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = FLOW.at(torch.tensor([timestep]))
        u = toy_unet(x, FLOW.unet_timesteps(torch.tensor([timestep])).item())
        return to_x0("flow", u, x, alpha, sigma), to_epsilon("flow", u, x, alpha, sigma)

    torch.testing.assert_close(sampler(denoise, noise, FLOW, grid), x, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpmpp_2m_of_a_flow_agrees_with_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    theirs.set_timesteps(12)
    noise = randn(0, 1, 4, 8, 8)
    x = noise * theirs.sigmas[0]
    for sigma, timestep in zip(theirs.sigmas, theirs.timesteps, strict=False):
        x = theirs.step(toy_unet(x, 1000 * sigma.item()), timestep, x).prev_sample

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = FLOW.at(torch.tensor([timestep]))
        u = toy_unet(x, timestep + 1)
        return to_x0("flow", u, x, alpha, sigma), to_epsilon("flow", u, x, alpha, sigma)

    grid = (1000 * theirs.sigmas[:-1].double() - 1).tolist()
    torch.testing.assert_close(dpmpp_2m(denoise, noise, FLOW, grid), x, rtol=1e-4, atol=1e-4)
