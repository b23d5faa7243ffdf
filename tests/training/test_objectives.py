"""From settings to what is learned: the tables that a run trains by are those of the math, and the defaults leave them alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.config.schema import Config
from aquatint.diffusion.densities import density
from aquatint.diffusion.loss import huber_c
from aquatint.diffusion.schedule import flow_schedule, reindexed, sdxl_schedule
from aquatint.diffusion.weighting import loss_weights
from aquatint.errors import UsageError
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.process import STANDARDISED, Process
from aquatint.training.adaptation import AdaptiveWeights, Importance, LearnedUncertainty
from aquatint.training.objectives import (
    TERMINAL_PROB,
    choose_adaptation,
    choose_densities,
    choose_objective,
    choose_process,
    mean_density,
    noise_kind,
    sampling_schedule,
    sampling_steps,
)  # fmt: skip

SHAPES = np.array([(1024, 1024), (832, 1216), (512, 512)])
V_ZTSNR = {"prediction": "v_prediction", "zero_terminal_snr": True}
CPU = torch.device("cpu")


EPSILON = Process()


def base_of(process=EPSILON):
    return BaseModel(Path("/models/base.safetensors"), sdxl_spec(), "single_file", process, {})


def config_of(**sections):
    values = {"model": {"base": "/b"}, "data": {"sources": [{"path": "/p"}]}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def objective_of(**sections):
    return choose_objective(config_of(**sections), base_of())


def densities_of(**sections):
    return choose_densities(config_of(**sections), base_of(), SHAPES)


def test_by_default_an_epsilon_base_is_trained_evenly():
    objective = objective_of()
    assert (objective.prediction, objective.loss, objective.huber_c, objective.reindexes) == ("epsilon", "mse", None, False)
    assert torch.equal(objective.weights, torch.ones(1000))
    assert not objective.schedule.zero_terminal_snr
    assert [one.tolist() for one in densities_of()] == [[pytest.approx(0.001, rel=1e-9)] * 1000] * 3


def test_zero_terminal_snr_is_weighed_by_clamped_v_and_drawn_more_often_at_its_end():
    objective = objective_of(model=V_ZTSNR)
    snr = sdxl_schedule(zero_terminal_snr=True).snr
    assert torch.equal(objective.weights, loss_weights("clamped_v", "v_prediction", snr, gamma=5.0, floor=0.05))
    assert objective.weights[-1] == 1
    (first, *_) = densities_of(model=V_ZTSNR)
    assert first[-1] == pytest.approx(TERMINAL_PROB + 0.99 * 0.001)
    assert first[0] == pytest.approx(0.99 * 0.001)


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"terminal_prob": 0.0}, 0.001), ({"terminal_prob": 0.5}, 0.5005), ({"highest": 899}, 0.0)],
)
def test_the_share_of_the_terminal_step_can_be_set(section, expected):
    assert densities_of(model=V_ZTSNR, timesteps=section)[0][999] == pytest.approx(expected)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "truncated", "debiased", "p2", "cosmap", "like_v", "like_epsilon"])
def test_every_weighting_reaches_the_run(weighting):
    settings = {"gamma": 3.0} if "min_snr" in weighting else {"p2_k": 2.0, "p2_gamma": 0.5} if weighting == "p2" else {}
    objective = objective_of(model=V_ZTSNR, diffusion={"weighting": weighting, **settings})
    p2 = {name: settings.get(name, 1.0) for name in ("p2_k", "p2_gamma")}
    expected = loss_weights(weighting, "v_prediction", objective.schedule.snr, gamma=3.0, floor=0.05, **p2)
    assert torch.equal(objective.weights, expected)
    assert objective.weights[-1] > 0


def test_normalised_weights_have_a_mean_of_1_over_what_is_drawn():
    sections = {"model": V_ZTSNR, "diffusion": {"weighting": "min_snr", "normalise_weights": True}, "timesteps": {"density": "cosmap"}}
    weights = objective_of(**sections).weights.double().numpy()
    assert weights @ densities_of(**sections)[0] == pytest.approx(1, rel=1e-6)


def test_the_bend_of_huber_is_by_timestep():
    objective = objective_of(diffusion={"loss": "huber", "huber_c": 0.2, "huber_schedule": "exponential", "huber_scale": 2.0})
    assert torch.equal(objective.huber_c, huber_c("exponential", objective.schedule.ve_sigmas, 0.2, 2.0))


def test_a_density_reaches_the_run():
    section = {"density": "logit_normal", "mean": 0.5, "std": 0.8, "shift": 2.0, "lowest": 5, "highest": 990, "uniform_share": 0.1}
    expected = density(
        "logit_normal", sdxl_schedule(zero_terminal_snr=False), mean=0.5, std=0.8, shift=2.0, lowest=5, highest=990, uniform_share=0.1
    )
    assert [one.tolist() for one in densities_of(timesteps=section)] == [expected.tolist()] * 3


def test_tilted_densities_differ_by_the_size_of_the_picture():
    square, wide, small = densities_of(timesteps={"resolution_noise": "tilt"})
    steps = np.arange(1000)
    assert square.tolist() == pytest.approx([0.001] * 1000)
    assert small @ steps < wide @ steps < square @ steps
    weights = [3.0, 1.0, 0.0]
    assert mean_density([square, wide, small], weights).tolist() == pytest.approx(((3 * square + wide) / 4).tolist())


def test_reindexed_noise_is_that_of_the_size():
    objective = objective_of(timesteps={"resolution_noise": "reindex"})
    large = objective.schedule_at(256, 256)
    assert torch.equal(large.sigmas, reindexed(objective.schedule, 2.0).sigmas)
    assert torch.equal(objective_of().schedule_at(256, 256).sigmas, objective.schedule.sigmas)


def test_a_range_that_is_never_drawn_is_refused_in_words():
    with pytest.raises(UsageError, match="never draws") as error:
        densities_of(timesteps={"density": "log_normal", "mean": -10.0, "std": 0.01, "lowest": 900})
    assert "timesteps.lowest" in error.value.hint


def test_a_contradiction_with_the_base_is_an_error_in_words():
    with pytest.raises(UsageError, match="trained for v_prediction") as error:
        choose_process(config_of(model={"prediction": "epsilon"}), base_of(Process("v_prediction", declared=True)))
    assert "model.retarget" in error.value.hint


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({}, type(None)),
        ({"diffusion": {"weighting": "learned"}}, LearnedUncertainty),
        ({"diffusion": {"weighting": "adaptive"}}, AdaptiveWeights),
        ({"timesteps": {"importance": True}}, Importance),
    ],
)
def test_what_follows_the_loss_is_what_was_asked_for(sections, kind):
    config = config_of(**sections)
    objective = choose_objective(config, base_of())
    assert torch.equal(objective.weights, torch.ones(1000))
    assert type(choose_adaptation(config, objective, np.full(1000, 0.001), CPU)) is kind


def test_kinds_of_noise_reach_the_loader():
    kind = noise_kind(config_of(noise={"offset": 0.05, "pyramid": 0.3, "input_perturbation": 0.1}))
    assert (kind.offset, kind.pyramid, kind.perturbed, kind.immiscible) == (0.05, 0.3, True, False)
    assert not noise_kind(config_of()).perturbed


def test_sampling_begins_where_it_is_told_to():
    process = Process("v_prediction", zero_terminal_snr=True)
    for name, sigma in (("novelai", 20000.0), ("comfyui", 4518.7637), ("diffusers", 4096.0)):
        config = config_of(model=V_ZTSNR, samples={"sigma_max": name})
        schedule = sampling_schedule(config, process, (1024, 1024), choose_objective(config, base_of()))
        assert schedule.ve_sigmas[-1].item() == pytest.approx(sigma)
    config = config_of(model=V_ZTSNR)
    assert sampling_schedule(config, process, (1024, 1024), choose_objective(config, base_of())).ve_sigmas[-1].isinf()


def test_a_flow_is_sampled_with_its_shift():
    config = config_of(model={"prediction": "flow"}, samples={"shift": 3.0})
    schedule = sampling_schedule(config, Process("flow"), (1024, 1024), choose_objective(config, base_of()))
    assert torch.equal(schedule.sigmas, flow_schedule(3.0).sigmas)


@pytest.mark.parametrize(("sigmas", "grid"), [(None, "trailing"), ((0.002, 80.0), "karras")])
def test_the_grid_suits_the_noise_levels(sigmas, grid):
    steps = sampling_steps(config_of(samples={"sampler": "heun", "steps": 9}), Process("v_prediction", edm_ve_sigmas=sigmas))
    assert (steps.grid, steps.sampler, steps.num_steps) == (grid, "heun", 9)


def test_standardised_latents_are_part_of_the_objective():
    assert objective_of(model={"standardise_latents": True}).scaling == STANDARDISED
