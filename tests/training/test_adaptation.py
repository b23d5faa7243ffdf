"""Weights and timesteps that follow the loss: each does what its paper says, and forgets a step that was left out."""

import numpy as np
import pytest
import torch

from aquatint.data.batch import Batch
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.diffusion.timesteps import draw_timesteps
from aquatint.training.adaptation import AdaptiveWeights, Importance, LearnedUncertainty

CPU = torch.device("cpu")
UNIFORM = np.full(1000, 0.001)
SCHEDULE = sdxl_schedule(zero_terminal_snr=False)


def batch_at(positions, timesteps=None):
    size = len(positions)
    return Batch(
        latents=torch.zeros(size, 4, 2, 2), noise=torch.zeros(size, 4, 2, 2),
        timesteps=torch.zeros(size, dtype=torch.int64) if timesteps is None else timesteps, prompt_embeds=None, pooled_prompt_embeds=None,
        time_ids=torch.zeros(size, 6), loss_weights=torch.ones(size), names=("",) * size, positions=tuple(positions), sources=(0,) * size,
    )  # fmt: skip


def loss_at(timesteps):
    """A loss that falls with the noise, as it does in training."""
    return 1.0 - 0.9 * timesteps.float() / 999


def test_learned_uncertainty_makes_every_level_pull_alike():
    """At its optimum exp(u) is the expected loss, so that loss / exp(u) is 1 everywhere (arXiv 2312.02696)."""
    adaptation = LearnedUncertainty(SCHEDULE, 0.05, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        timesteps = torch.randint(0, 1000, (64,), generator=generator)
        losses = loss_at(timesteps)
        adaptation.weighed(losses, timesteps).mean().backward()
        adaptation.learn(losses, timesteps)
    every = torch.arange(1000)
    with torch.no_grad():
        ratio = loss_at(every) / adaptation.module(every).exp()
    assert ratio[50:].sub(1).abs().max() < 0.15


def test_learned_uncertainty_starts_as_the_plain_loss_and_forgets_a_step():
    adaptation = LearnedUncertainty(SCHEDULE, 0.05, CPU)
    timesteps = torch.tensor([3, 700])
    losses = torch.tensor([0.3, 2.0])
    weighed = adaptation.weighed(losses, timesteps)
    assert torch.equal(weighed.detach(), losses)
    weighed.mean().backward()
    adaptation.forget()
    adaptation.learn(losses, timesteps)  # without a gradient: nothing to do
    assert adaptation.tensors()["weight"].abs().max() == 0


def test_adaptive_weights_divide_by_the_recent_loss():
    adaptation = AdaptiveWeights(10, 0.9, UNIFORM, CPU)
    every = torch.arange(1000)
    assert torch.equal(adaptation.weighed(loss_at(every), every), loss_at(every))
    for _ in range(30):
        adaptation.learn(loss_at(every), every)
    weights = adaptation.weighed(torch.ones(1000), every)
    means = loss_at(every).view(10, 100).mean(dim=1)
    expected = 1 / (means.repeat_interleave(100) + 1e-3)
    torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-4, atol=0)


def importance(**settings):
    values = {"seed": 7, "samples_per_step": 4, "spread": "strata", **settings}
    return Importance(10, UNIFORM, **values)


def test_importance_draws_by_position_from_the_density_itself_until_it_knows_enough():
    adaptation = importance()
    placed = adaptation.placed(batch_at([8, 9]))
    assert torch.equal(placed.timesteps, draw_timesteps(7, [8, 9], 4))
    adaptation.learn(torch.tensor([1.0]), torch.tensor([5]))
    assert adaptation.probabilities.tolist() == UNIFORM.tolist()


def test_importance_prefers_large_losses_and_its_mean_stays_the_same():
    adaptation = importance()
    every = torch.arange(1000)
    for _ in range(10):
        middles = every[50::100]
        adaptation.learn(loss_at(middles), middles)
    probabilities = adaptation.probabilities
    assert probabilities[:100].sum() > 3 * probabilities[-100:].sum()
    weighed = adaptation.weighed(loss_at(every), every).double().numpy()
    assert probabilities @ weighed == pytest.approx(loss_at(every).double().mean().item(), rel=1e-5)
    placed = adaptation.placed(batch_at(range(4000)))
    assert placed.timesteps.float().mean() < 460


@pytest.mark.parametrize(
    "make", [lambda: LearnedUncertainty(SCHEDULE, 0.05, CPU), lambda: AdaptiveWeights(10, 0.9, UNIFORM, CPU), importance]
)
def test_what_is_saved_and_put_back_goes_on_in_the_same_way(make):
    def steps(adaptation, begin, end):
        for step in range(begin, end):
            batch = adaptation.placed(batch_at(range(4 * step, 4 * step + 4), draw_timesteps(7, range(4 * step, 4 * step + 4), 4)))
            losses = loss_at(batch.timesteps)
            weighed = adaptation.weighed(losses, batch.timesteps)
            if weighed.requires_grad:
                weighed.mean().backward()
            adaptation.learn(losses, batch.timesteps)

    straight, resumed = make(), make()
    steps(straight, 0, 40)
    saved = {name: tensor.clone() for name, tensor in straight.tensors().items()}
    for name, tensor in resumed.tensors().items():
        tensor.copy_(saved[name])
    steps(straight, 40, 60)
    steps(resumed, 40, 60)
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
