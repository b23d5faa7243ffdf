"""From a batch to errors: what the UNet sees, what it is told, what it should answer, and what a mask leaves out."""

from dataclasses import replace

import pytest
import torch

from aquatint.diffusion.loss import huber_c
from aquatint.diffusion.parameterization import target
from aquatint.diffusion.schedule import reindexed
from aquatint.models.sdxl.process import Process
from aquatint.training import objective as module
from aquatint.training.objective import Objective, denoise, sample_losses, squared_errors
from tests.training.test_adaptation import batch_at

ONES = torch.ones(1000)
PROCESSES = {
    "epsilon": Process(),
    "v": Process("v_prediction", zero_terminal_snr=True),
    "x0": Process("x0", zero_terminal_snr=True),
    "v told the noise": Process("v_prediction", edm_ve_sigmas=(0.002, 120.0)),
    "EDM": Process("edm", edm_ve_sigmas=(0.002, 80.0)),
    "flow": Process("flow"),
}


def objective_of(process, **others):
    return Objective(process.schedule(), process.prediction, ONES, process.sigma_data, **others)


def batch_of(timesteps, size=(6, 4)):
    generator = torch.Generator().manual_seed(3)
    timesteps = torch.tensor(timesteps)
    shape = (len(timesteps), 4, *size)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return replace(batch_at(range(len(timesteps)), timesteps), latents=latents, noise=noise)


@pytest.fixture
def asked(monkeypatch):
    """What the UNet was asked, by a UNet that answers with what it is."""
    calls = []

    def predict(unet, noisy, timesteps, *conditions):
        calls.append((noisy, timesteps))
        return unet.answer(noisy) if hasattr(unet, "answer") else torch.zeros_like(noisy)

    monkeypatch.setattr(module, "predict", predict)
    return calls


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_perfect_unet_has_no_loss_and_sees_what_it_was_trained_to_see(process, asked):
    objective, batch = objective_of(process), batch_of([0, 500, 999])
    alpha, sigma = objective.schedule.at(batch.timesteps)
    wanted = target(process.prediction, batch.latents, batch.noise, alpha, sigma, sigma_data=process.sigma_data)
    unet = torch.nn.Module()
    unet.answer = lambda noisy: wanted
    found = denoise(unet, objective, batch, autocast=False)
    assert squared_errors(objective, batch, found).tolist() == [0, 0, 0]
    ((seen, told),) = asked
    if process.prediction == "edm":  # c_in x of the paper, from x = x0 + ve_sigma e
        ve_sigma = sigma / alpha
        c_in = (ve_sigma.square() + 0.5**2).rsqrt()
        torch.testing.assert_close(seen, c_in * (batch.latents + ve_sigma * batch.noise), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(seen, alpha * batch.latents + sigma * batch.noise)
    if process.edm_ve_sigmas is not None:
        torch.testing.assert_close(told, (sigma / alpha).flatten().log() / 4, rtol=1e-5, atol=1e-5)
    elif process.prediction == "flow":
        torch.testing.assert_close(told, 1000 * sigma.flatten())
    else:
        assert told.tolist() == [0, 500, 999]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_errors_of_the_output_and_of_the_picture_differ_by_the_table(process):
    """|dX0|^2 of an answer that is wrong by d, against what the table makes of |d|^2 (methods, section 3)."""
    from aquatint.diffusion.parameterization import to_x0

    objective, batch = objective_of(process), batch_of([30, 500, 990])
    alpha, sigma = objective.schedule.at(batch.timesteps)
    known = {"alpha": alpha, "sigma": sigma, "sigma_data": process.sigma_data}
    noisy = alpha * batch.latents + sigma * batch.noise
    right = target(process.prediction, batch.latents, batch.noise, **known)
    wrong = right + torch.randn(right.shape, generator=torch.Generator().manual_seed(5))
    apart = (to_x0(process.prediction, wrong, noisy, **known) - batch.latents).square().flatten(1).mean(dim=1)
    of_output = (wrong - right).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(of_output / objective.errors_of_x0[batch.timesteps], apart, rtol=2e-3, atol=1e-6)


def test_input_perturbation_is_seen_and_not_aimed_at_and_spares_pure_noise(asked):
    process = Process("v_prediction", zero_terminal_snr=True)
    batch = batch_of([500, 999])
    perturbed = replace(batch, perturbation=torch.ones_like(batch.noise))
    objective = objective_of(process, input_perturbation=0.1)
    plain, with_more = (denoise(torch.nn.Module(), objective, one, autocast=False) for one in (batch, perturbed))
    assert torch.equal(plain.target, with_more.target)
    (before, _), (after, _) = asked
    sigma = objective.schedule.at(batch.timesteps)[1]
    torch.testing.assert_close(after[0] - before[0], 0.1 * sigma[0].expand_as(after[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(after[1], before[1])


def test_reindexed_noise_follows_the_size_of_the_picture(asked):
    objective = objective_of(Process(), reindexes=True)
    batch = batch_of([500], size=(256, 256))
    denoise(torch.nn.Module(), objective, batch, autocast=False)
    alpha, sigma = reindexed(objective.schedule, 2.0).at(batch.timesteps)
    torch.testing.assert_close(asked[0][0], alpha * batch.latents + sigma * batch.noise)
    assert (sigma / alpha).item() == pytest.approx(3.23655765, rel=1e-6)  # methods, section 2.2


def test_outside_of_a_mask_the_base_model_is_the_aim(asked):
    """Inside: mean of (1 - target)^2. Outside: mean of (1 - 3)^2 = 4, with its weight; each over its own area."""
    batch = batch_of([500, 500], size=(2, 2))
    masks = torch.zeros(2, 1, 2, 2)
    masks[:, :, 0] = 1.0
    masks[1] = 1.0  # nothing outside
    batch = replace(batch, masks=masks)
    unet, frozen = torch.nn.Module(), torch.nn.Module()
    unet.answer, frozen.answer = (lambda noisy: torch.ones_like(noisy)), (lambda noisy: torch.full_like(noisy, 3.0))
    objective = objective_of(Process(), mask_prior_weight=0.5)
    found = denoise(unet, objective, batch, autocast=False, frozen=frozen)
    inside = (1 - batch.noise).square()
    expected = [inside[0, :, 0].mean() + 0.5 * 4, inside[1].mean()]
    torch.testing.assert_close(sample_losses(objective, batch, found), torch.stack([torch.as_tensor(value) for value in expected]))


def test_the_bend_of_huber_is_that_of_each_samples_timestep(asked):
    bends = huber_c("snr", Process().schedule().ve_sigmas, 0.1)
    objective, batch = objective_of(Process(), loss="huber", huber_c=bends), batch_of([0, 999])
    found = denoise(torch.nn.Module(), objective, batch, autocast=False)
    c = bends[batch.timesteps].view(-1, 1, 1, 1)
    expected = (2 * c * ((batch.noise.square() + c.square()).sqrt() - c)).flatten(1).mean(dim=1)
    torch.testing.assert_close(sample_losses(objective, batch, found), expected)
