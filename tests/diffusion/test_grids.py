from itertools import pairwise

import pytest
import torch

from aquatint.diffusion.grids import GRIDS, exponential_sigmas, karras_sigmas, leading_timesteps, sampling_timesteps, sgm_uniform_timesteps
from aquatint.diffusion.schedule import STAND_INS, edm_schedule, flow_schedule, sdxl_schedule

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
SHOWN = ZERO_TERMINAL.ending_at(STAND_INS["novelai"])
SCHEDULES = {"plain": PLAIN, "stand_in": SHOWN, "edm": edm_schedule()}


def levels(schedule, timesteps):
    alphas, sigmas = schedule.levels(torch.tensor(timesteps, dtype=torch.float64))
    return sigmas / alphas


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 28, 333, 1000])
def test_every_grid_falls_from_the_noisy_end(grid, schedule, num_steps):
    timesteps = sampling_timesteps(grid, schedule, num_steps)
    assert len(timesteps) == num_steps
    assert all(isinstance(timestep, float) for timestep in timesteps)
    assert all(later < earlier for earlier, later in pairwise(timesteps))
    assert timesteps[-1] >= 0
    assert (timesteps[0] == 999) == (grid != "leading" or num_steps == 1000)


@pytest.mark.parametrize("grid", ["trailing", "sgm_uniform"])
@pytest.mark.parametrize("schedule", [ZERO_TERMINAL, flow_schedule()], ids=["zero_terminal_snr", "flow"])
def test_these_grids_start_from_pure_noise_and_need_no_stand_in(grid, schedule):
    noise = levels(schedule, sampling_timesteps(grid, schedule, 28))
    assert noise[0].item() == float("inf")
    assert (noise.diff()[1:] < 0).all()


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("schedule", [ZERO_TERMINAL, flow_schedule()], ids=["zero_terminal_snr", "flow"])
def test_these_grids_cannot_be_spaced_from_infinity(grid, schedule):
    with pytest.raises(ValueError, match="from infinity"):
        sampling_timesteps(grid, schedule, 28)


def test_a_leading_grid_misses_pure_noise():
    with pytest.raises(ValueError, match="trailing"):
        sampling_timesteps("leading", ZERO_TERMINAL, 28)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(grid, num_steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        sampling_timesteps(grid, PLAIN, num_steps)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_noise_grids_have_the_noise_that_they_ask_for(schedule):
    ends = schedule.ve_sigmas[0].item(), schedule.ve_sigmas[-1].item()
    for grid, wanted in [("karras", karras_sigmas(20, *ends)), ("exponential", exponential_sigmas(20, *ends))]:
        torch.testing.assert_close(levels(schedule, sampling_timesteps(grid, schedule, 20)), torch.from_numpy(wanted), rtol=1e-9, atol=0)
        assert (wanted[0], wanted[-1]) == (ends[1], ends[0])


def test_exponential_grids_fall_by_the_same_factor():
    noise = exponential_sigmas(5, 0.01, 100)
    assert noise.tolist() == pytest.approx([100, 10, 1, 0.1, 0.01])


def test_karras_grids_of_the_first_power_are_even():
    assert karras_sigmas(5, 1, 9, rho=1.0).tolist() == pytest.approx([9, 7, 5, 3, 1])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ("trailing", {"timestep_spacing": "trailing"}),
        ("leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("karras", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
        ("exponential", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    ],
)
@pytest.mark.parametrize("num_steps", [10, 28])
def test_grids_agree_with_diffusers(grid, options, num_steps):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    theirs.set_timesteps(num_steps)
    timesteps = sampling_timesteps(grid, PLAIN, num_steps)
    assert timesteps == pytest.approx(theirs.timesteps.tolist(), rel=1e-4, abs=0.01)
    torch.testing.assert_close(levels(PLAIN, timesteps).float(), theirs.sigmas[:-1], rtol=2e-5, atol=0)


def test_sgm_uniform_is_even_and_leaves_zero_out():
    assert sgm_uniform_timesteps(10) == pytest.approx([999, 899.1, 799.2, 699.3, 599.4, 499.5, 399.6, 299.7, 199.8, 99.9])


def test_leading_timesteps_end_at_one():
    assert leading_timesteps(10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert leading_timesteps(1000) == list(range(999, -1, -1))
