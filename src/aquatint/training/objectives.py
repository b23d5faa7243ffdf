"""From a config and its base to what is learned: noise levels, loss, weights, densities. A part of the composition root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from aquatint.config.schema import Config
from aquatint.data.loader import NoiseKind
from aquatint.diffusion.densities import density
from aquatint.diffusion.grids import Grid
from aquatint.diffusion.loss import huber_c
from aquatint.diffusion.schedule import STAND_INS, Schedule, resolution_factor
from aquatint.diffusion.timesteps import Probabilities
from aquatint.diffusion.weighting import Weighting, loss_weights, normalised
from aquatint.errors import UsageError
from aquatint.models.sdxl.generate import PX_PER_LATENT, Steps
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.process import Process
from aquatint.training.adaptation import Adaptation, AdaptiveWeights, Importance, LearnedUncertainty
from aquatint.training.objective import Objective
from aquatint.training.process import conflicts, wanted_process

TERMINAL_PROB = 0.01  # with zero terminal SNR, where sampling begins at a timestep that is one of a thousand


def choose_process(config: Config, base: BaseModel) -> Process:
    """The diffusion process of the run. Raises UsageError when config and base contradict each other."""
    for conflict in conflicts(config, base):
        raise UsageError(conflict.message.replace("`", ""), hint=conflict.hint.replace("`", ""))
    return wanted_process(config, base)


def choose_objective(config: Config, base: BaseModel) -> Objective:
    """What is learned. Raises UsageError when the config contradicts itself or the base model."""
    process, section = choose_process(config, base), config.diffusion
    schedule = process.schedule()
    weighting = chosen_weighting(config, process)
    if weighting == "learned" or weighting == "adaptive":
        weights = torch.ones(len(schedule.alphas))
    else:
        weights = loss_weights(
            weighting, process.prediction, schedule.snr, gamma=section.gamma, floor=section.weight_floor, p2_k=section.p2_k,
            p2_gamma=section.p2_gamma, sigma_data=process.sigma_data,
        )  # fmt: skip
    if section.normalise_weights:
        weights = normalised(weights, torch.from_numpy(density_at(config, process, schedule, 1.0)))
    bends = None
    if section.loss != "mse":
        bends = huber_c(section.huber_schedule, schedule.ve_sigmas, section.huber_c, section.huber_scale)
    return Objective(
        schedule, process.prediction, weights, process.sigma_data, section.loss, bends, config.noise.input_perturbation,
        section.mask_prior_weight, process.latents, reindexes=config.timesteps.resolution_noise == "reindex",
    )  # fmt: skip


def chosen_weighting(config: Config, process: Process) -> Weighting | Literal["learned", "adaptive"]:
    """The weighting, with what `auto` stands for: clamped_v keeps the terminal step at its full weight."""
    weighting = config.diffusion.weighting
    if weighting == "auto":
        return "clamped_v" if process.zero_terminal_snr else "none"
    return weighting


def density_at(config: Config, process: Process, schedule: Schedule, factor: float) -> Probabilities:
    """How often each timestep is drawn for pictures of this `resolution_factor`, (1000,)."""
    section = config.timesteps
    terminal = section.terminal_prob
    if terminal == "auto":
        terminal = TERMINAL_PROB if process.zero_terminal_snr and section.highest == len(schedule.alphas) - 1 else 0.0
    return density(
        section.density, schedule, mean=section.mean, std=section.std, mode_scale=section.mode_scale, sigma_data=process.sigma_data,
        shift=section.shift, tilt=factor if section.resolution_noise == "tilt" else 1.0, lowest=section.lowest, highest=section.highest,
        uniform_share=section.uniform_share, terminal_prob=terminal,
    )  # fmt: skip


def choose_densities(config: Config, base: BaseModel, shapes_hw: npt.NDArray[np.integer]) -> tuple[Probabilities, ...]:
    """How often each timestep is drawn in each bucket, from the buckets' shapes (b, 2) in pixels. Raises UsageError if never."""
    process = wanted_process(config, base)
    schedule = process.schedule()
    try:
        return tuple(density_at(config, process, schedule, resolution_factor(int(h), int(w))) for h, w in shapes_hw)
    except ValueError as error:
        raise UsageError(
            f"timesteps: {error}", hint="widen timesteps.lowest and timesteps.highest, or set timesteps.uniform_share"
        ) from error


def mean_density(densities: Sequence[Probabilities], samples: Sequence[float]) -> Probabilities:
    """How often each timestep is drawn over all buckets, of which so many samples come."""
    mean: Probabilities = np.average(np.stack(densities), axis=0, weights=samples)
    return mean


def choose_adaptation(config: Config, objective: Objective, drawn: Probabilities, device: torch.device) -> Adaptation | None:
    """What follows the loss in this run, if anything does. `drawn`: how often each timestep comes."""
    section, timesteps = config.diffusion, config.timesteps
    if section.weighting == "learned":
        return LearnedUncertainty(objective.schedule, section.uncertainty_learning_rate, device)
    if section.weighting == "adaptive":
        return AdaptiveWeights(section.adaptive_ranges, section.adaptive_decay, drawn, device)
    if timesteps.importance:
        samples = config.training.per_step
        return Importance(timesteps.importance_ranges, drawn, seed=config.run.seed, samples_per_step=samples, spread=timesteps.spread)
    return None


def noise_kind(config: Config) -> NoiseKind:
    """What is done to the noise."""
    section = config.noise
    return NoiseKind(
        section.offset, section.offset_slope, section.pyramid, section.pyramid_levels,
        perturbed=section.input_perturbation > 0, immiscible=section.immiscible,
    )  # fmt: skip


def sampling_schedule(config: Config, process: Process, size_hw: tuple[int, int], objective: Objective) -> Schedule:
    """The noise levels that pictures of this size are drawn at."""
    if process.prediction == "flow":
        objective = replace(objective, schedule=process.schedule(shift=config.samples.shift))
    schedule = objective.schedule_at(size_hw[0] // PX_PER_LATENT, size_hw[1] // PX_PER_LATENT)
    return schedule if config.samples.sigma_max == "exact" else schedule.ending_at(STAND_INS[config.samples.sigma_max])


def sampling_steps(config: Config, process: Process) -> Steps:
    """How pictures are drawn."""
    section = config.samples
    grid: Grid = section.grid if section.grid != "auto" else ("karras" if process.edm_ve_sigmas is not None else "trailing")
    return Steps(section.steps, section.guidance_scale, section.guidance_rescale, section.sampler, grid)
