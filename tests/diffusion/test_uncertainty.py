import pytest
import torch

from aquatint.diffusion.schedule import flow_schedule, sdxl_schedule
from aquatint.diffusion.uncertainty import Uncertainty, uncertain_loss

ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
EVERY_TIMESTEP = torch.arange(1000)


def test_it_starts_as_the_loss_itself():
    u = Uncertainty(ZERO_TERMINAL)(EVERY_TIMESTEP)
    assert torch.equal(u, torch.zeros(1000))
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uncertain_loss(losses, u), losses)


@pytest.mark.parametrize("schedule", [ZERO_TERMINAL, sdxl_schedule(zero_terminal_snr=False), flow_schedule()])
def test_features_are_finite_of_unit_strength_and_the_same_every_time(schedule):
    features = Uncertainty(schedule).features
    assert features.shape == (1000, 128)
    assert features.isfinite().all()
    assert features.square().mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(features, Uncertainty(schedule).features)


def test_only_its_weights_are_saved():
    assert {name: tuple(value.shape) for name, value in Uncertainty(ZERO_TERMINAL).state_dict().items()} == {"weight": (128,)}


def test_the_loss_is_least_at_its_own_logarithm():
    u = torch.linspace(-3, 1, 401)
    assert u[uncertain_loss(torch.tensor(0.25), u).argmin()].item() == pytest.approx(-1.386, abs=0.01)


def test_it_learns_the_logarithm_of_the_loss_at_every_noise_level():
    module = Uncertainty(ZERO_TERMINAL)
    losses = 0.05 + torch.sigmoid(ZERO_TERMINAL.ve_sigmas.clamp(max=20000).log()).float()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        uncertain_loss(losses, module(EVERY_TIMESTEP)).mean().backward()
        optimizer.step()
    assert (module(EVERY_TIMESTEP).detach() - losses.log()).abs().mean().item() < 0.03


def test_it_stays_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Uncertainty(ZERO_TERMINAL)(EVERY_TIMESTEP[:3]).dtype == torch.float32
