import pytest
import torch

from aquatint.diffusion.parameterization import target, to_epsilon, to_x0
from aquatint.diffusion.schedule import add_noise, sdxl_schedule

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def latents_and_noise(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)))


def test_vectors_at_timestep_500():
    latents, noise = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), -0.5)
    alpha, sigma = PLAIN.at(torch.tensor([500]))
    assert [alpha.item(), sigma.item()] == pytest.approx([0.52567355, 0.85068638], rel=1e-6)
    assert target("epsilon", latents, noise, alpha, sigma).item() == -0.5
    assert target("v_prediction", latents, noise, alpha, sigma).item() == pytest.approx(-1.11352316, rel=1e-6)
    noisy = add_noise(latents, noise, alpha, sigma).item()
    assert noisy * (1 + PLAIN.ve_sigmas[500].item() ** 2) ** 0.5 == pytest.approx(0.19086059, rel=1e-6)


@PREDICTIONS
@pytest.mark.parametrize("timestep", [0, 1, 500, 998])
@pytest.mark.parametrize("schedule", [PLAIN, ZERO_TERMINAL], ids=["plain", "zero_terminal_snr"])
def test_a_perfect_output_gives_picture_and_noise_back(prediction, timestep, schedule):
    latents, noise = latents_and_noise(2, 4, 8, 8)
    alpha, sigma = schedule.at(torch.full((2,), timestep))
    noisy, output = add_noise(latents, noise, alpha, sigma), target(prediction, latents, noise, alpha, sigma)
    lost = 1e-6 / alpha.min().item() if prediction == "epsilon" else 1e-6  # dividing by alpha multiplies float32's error
    torch.testing.assert_close(to_x0(prediction, output, noisy, alpha, sigma), latents, rtol=0, atol=max(lost, 2e-6))
    torch.testing.assert_close(to_epsilon(prediction, output, noisy, alpha, sigma), noise, rtol=0, atol=2e-6)


def test_v_round_trip_is_exact_where_the_snr_is_zero():
    latents, noise = latents_and_noise(1, 4, 8, 8)
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([999]))
    output = target("v_prediction", latents, noise, alpha, sigma)
    assert torch.equal(output, -latents)
    assert torch.equal(to_x0("v_prediction", output, noise, alpha, sigma), latents)
    assert torch.equal(to_epsilon("v_prediction", output, noise, alpha, sigma), noise)


def test_epsilon_refuses_to_guess_a_picture_from_pure_noise():
    x = torch.zeros(2, 4, 1, 1)
    with pytest.raises(ValueError, match="needs v_prediction"):
        to_x0("epsilon", x, x, *ZERO_TERMINAL.at(torch.tensor([10, 999])))


def test_v_is_almost_epsilon_where_there_is_almost_no_noise():
    latents, noise = latents_and_noise(1, 4, 8, 8)
    v = target("v_prediction", latents, noise, *PLAIN.at(torch.tensor([0])))
    torch.testing.assert_close(v, noise, rtol=0, atol=0.2)


@pytest.mark.parametrize("timestep", [3, 250, 700])
def test_squared_errors_convert_by_the_snr(timestep):
    """|dE|^2 = SNR |dX0|^2 and |dX0|^2 = sigma^2 |dV|^2: what the loss weights rest on."""
    latents, noise = latents_and_noise(1, 4, 8, 8)
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([timestep]))
    noisy = add_noise(latents, noise, alpha, sigma)
    v = target("v_prediction", latents, noise, alpha, sigma) + 0.1
    error_x0 = (to_x0("v_prediction", v, noisy, alpha, sigma) - latents).square().mean().item()
    error_epsilon = (to_epsilon("v_prediction", v, noisy, alpha, sigma) - noise).square().mean().item()
    assert error_x0 == pytest.approx(sigma.item() ** 2 * 0.01, rel=1e-4)
    assert error_epsilon == pytest.approx(ZERO_TERMINAL.snr[timestep].item() * error_x0, rel=1e-4)


@PREDICTIONS
def test_half_precision_outputs_are_converted_in_float32(prediction):
    x = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    alpha, sigma = PLAIN.at(torch.tensor([500]))
    for convert in (target, to_x0, to_epsilon):
        assert convert(prediction, x, x, alpha, sigma).dtype == torch.float32
