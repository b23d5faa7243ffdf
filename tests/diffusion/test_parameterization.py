import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.parameterization import (
    PREDICTIONS,
    convert,
    edm_preconditioning,
    flow_from_v,
    input_scale,
    target,
    to_epsilon,
    to_x0,
    v_from_flow,
)
from aquatint.diffusion.schedule import add_noise, flow_schedule, sdxl_schedule
from aquatint.diffusion.weighting import error_ratio

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
FLOW = flow_schedule()
EVERY_PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)
SIGMA_DATA = 0.5
SUITED = [
    *((prediction, schedule) for prediction in ("epsilon", "v_prediction", "x0", "edm") for schedule in (PLAIN, ZERO_TERMINAL)),
    *((prediction, FLOW) for prediction in ("epsilon", "x0", "flow")),
]
SUITED_PAIRS = pytest.mark.parametrize(
    ("prediction", "schedule"),
    SUITED,
    ids=[f"{p}-{'flow' if s.flow else 'zero_terminal_snr' if s.zero_terminal_snr else 'plain'}" for p, s in SUITED],
)


def latents_and_noise(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)))


@SUITED_PAIRS
@pytest.mark.parametrize("timestep", [0, 1, 100, 500, 900, 998, 999])
def test_a_perfect_output_gives_picture_and_noise_back(prediction, schedule, timestep):
    latents, noise = latents_and_noise(2, 4, 8, 8)
    alpha, sigma = schedule.at(torch.full((2,), timestep))
    if prediction == "epsilon" and alpha.min() == 0:
        return
    noisy = add_noise(latents, noise, alpha, sigma)
    output = target(prediction, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    lost_x0 = 1e-6 / alpha.min().item() if prediction == "epsilon" else 1e-6  # dividing by alpha multiplies float32's error
    lost_noise = 1e-6 / sigma.min().item() if prediction == "x0" else 1e-6
    x0 = to_x0(prediction, output, noisy, alpha, sigma, sigma_data=SIGMA_DATA)
    epsilon = to_epsilon(prediction, output, noisy, alpha, sigma, sigma_data=SIGMA_DATA)
    torch.testing.assert_close(x0, latents, rtol=0, atol=max(lost_x0, 4e-6))
    torch.testing.assert_close(epsilon, noise, rtol=0, atol=max(lost_noise, 4e-6))


@pytest.mark.parametrize(("given_as", "wanted"), [*itertools.product(PREDICTIONS, PREDICTIONS)])
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_every_prediction_converts_to_every_other(given_as, wanted, timestep):
    """On SDXL's schedule, which the velocity of a flow can be read from as well."""
    latents, noise = latents_and_noise(2, 4, 8, 8)
    alpha, sigma = PLAIN.at(torch.full((2,), timestep))
    noisy = add_noise(latents, noise, alpha, sigma)
    output = target(given_as, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    expected = target(wanted, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    converted = convert(given_as, wanted, output, noisy, alpha, sigma, sigma_data=SIGMA_DATA)
    torch.testing.assert_close(converted, expected, rtol=0, atol=4e-6 / min(alpha.min().item(), sigma.min().item()))


@pytest.mark.parametrize(("given_as", "wanted"), [*itertools.permutations(["v_prediction", "x0", "edm", "flow"], 2)])
def test_conversions_hold_where_the_snr_is_zero(given_as, wanted):
    latents, noise = latents_and_noise(1, 4, 8, 8)
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([999]))
    output = target(given_as, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    expected = target(wanted, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    converted = convert(given_as, wanted, output, noise, alpha, sigma, sigma_data=SIGMA_DATA)
    torch.testing.assert_close(converted, expected, rtol=1e-6, atol=1e-6)


def test_a_conversion_reads_only_what_it_needs():
    x = torch.ones(1, 4, 1, 1)
    alpha, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert torch.equal(convert("epsilon", "epsilon", x, x, alpha, sigma), x)
    with pytest.raises(ValueError, match="does not determine x0"):
        convert("epsilon", "v_prediction", x, x, alpha, sigma)
    with pytest.raises(ValueError, match="does not determine the noise"):
        convert("x0", "epsilon", x, x, sigma, alpha)
    assert torch.equal(convert("v_prediction", "x0", x, x, alpha, sigma), -x)


def test_v_round_trip_is_exact_where_the_snr_is_zero():
    latents, noise = latents_and_noise(1, 4, 8, 8)
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([999]))
    output = target("v_prediction", latents, noise, alpha, sigma)
    assert torch.equal(output, -latents)
    assert torch.equal(to_x0("v_prediction", output, noise, alpha, sigma), latents)
    assert torch.equal(to_epsilon("v_prediction", output, noise, alpha, sigma), noise)


@pytest.mark.parametrize("schedule", [ZERO_TERMINAL, FLOW], ids=["zero_terminal_snr", "flow"])
def test_epsilon_refuses_to_guess_a_picture_from_pure_noise(schedule):
    x = torch.zeros(2, 4, 1, 1)
    with pytest.raises(ValueError, match="needs v_prediction"):
        to_x0("epsilon", x, x, *schedule.at(torch.tensor([10, 999])))


def test_x0_refuses_to_guess_noise_from_a_clean_picture():
    x = torch.zeros(1, 4, 1, 1)
    with pytest.raises(ValueError, match="where there is none"):
        to_epsilon("x0", x, x, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_v_is_almost_epsilon_where_there_is_almost_no_noise():
    latents, noise = latents_and_noise(1, 4, 8, 8)
    v = target("v_prediction", latents, noise, *PLAIN.at(torch.tensor([0])))
    torch.testing.assert_close(v, noise, rtol=0, atol=0.2)


@SUITED_PAIRS
@pytest.mark.parametrize("timestep", [3, 250, 700])
def test_squared_errors_convert_by_the_snr(prediction, schedule, timestep):
    """|dOutput|^2 = ratio(SNR) |dX0|^2: what the loss weights rest on."""
    latents, noise = latents_and_noise(1, 4, 8, 8)
    alpha, sigma = schedule.at(torch.tensor([timestep]))
    noisy = add_noise(latents, noise, alpha, sigma)
    output = target(prediction, latents, noise, alpha, sigma, sigma_data=SIGMA_DATA) + 0.1
    error_x0 = (to_x0(prediction, output, noisy, alpha, sigma, sigma_data=SIGMA_DATA) - latents).square().mean().item()
    ratio = error_ratio(prediction, schedule.snr[timestep], SIGMA_DATA).item()
    assert pytest.approx(ratio * error_x0, rel=1e-3) == 0.01


@given(ve_sigma=st.floats(0.01, 100), sigma_data=st.floats(0.1, 2), x0=st.floats(-3, 3), e=st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_edm_is_the_papers_preconditioning_of_the_scaled_input(ve_sigma, sigma_data, x0, e):
    skip, out, scale_in, _, weight = (
        value.item() for value in edm_preconditioning(torch.tensor(ve_sigma, dtype=torch.float64), sigma_data)
    )
    alpha = torch.tensor((1 + ve_sigma**2) ** -0.5, dtype=torch.float64).view(1, 1, 1, 1)
    sigma = ve_sigma * alpha
    noisy = alpha * x0 + sigma * e
    scale = input_scale("edm", alpha, sigma, sigma_data=sigma_data)
    assert (scale * noisy).item() == pytest.approx(scale_in * (x0 + ve_sigma * e), rel=1e-9, abs=1e-9)
    full = torch.full((1, 1, 1, 1), 1.0)
    f = target("edm", x0 * full, e * full, alpha, sigma, sigma_data=sigma_data).item()
    assert f == pytest.approx((x0 - skip * (x0 + ve_sigma * e)) / out, rel=1e-4, abs=1e-4)
    assert weight * out**2 == pytest.approx(1, rel=1e-9)


def test_edm_of_unit_spread_is_v_with_the_other_sign_and_the_plain_input():
    latents, noise = latents_and_noise(3, 4, 8, 8)
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([0, 500, 999]))
    f, v = target("edm", latents, noise, alpha, sigma), target("v_prediction", latents, noise, alpha, sigma)
    torch.testing.assert_close(f, -v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(input_scale("edm", alpha, sigma), torch.ones_like(alpha))


@EVERY_PREDICTION
def test_only_edm_scales_its_input(prediction):
    alpha, sigma = PLAIN.at(torch.tensor([0, 500]))
    scale = input_scale(prediction, alpha, sigma, sigma_data=SIGMA_DATA)
    assert (scale != 1).any() == (prediction == "edm")
    if prediction == "edm":
        torch.testing.assert_close(scale.square() * (sigma.square() + (SIGMA_DATA * alpha).square()), torch.ones_like(scale))


def test_the_velocity_of_a_flow_follows_from_v_at_the_same_noise():
    latents, noise = latents_and_noise(5, 4, 8, 8)
    t = torch.tensor([0.0, 0.001, 0.25, 0.9, 1.0]).view(-1, 1, 1, 1)
    x_flow = add_noise(latents, noise, 1 - t, t)
    norm = torch.hypot(1 - t, t)
    v = target("v_prediction", latents, noise, (1 - t) / norm, t / norm)
    torch.testing.assert_close(flow_from_v(v, x_flow, t), noise - latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v_from_flow(noise - latents, x_flow, t), v, rtol=1e-5, atol=1e-5)


@EVERY_PREDICTION
def test_half_precision_outputs_are_converted_in_float32(prediction):
    x = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    alpha, sigma = PLAIN.at(torch.tensor([500]))
    for function in (target, to_x0, to_epsilon):
        assert function(prediction, x, x, alpha, sigma).dtype == torch.float32
    assert convert(prediction, prediction, x, x, alpha, sigma).dtype == torch.float32
