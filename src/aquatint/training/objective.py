"""What is learned: from a batch to the error of each of its samples. Noise, targets and errors are float32 whatever the model is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aquatint.data.batch import Batch
from aquatint.diffusion.loss import Loss, masked_loss_with_prior, per_sample_loss, per_sample_mse
from aquatint.diffusion.noise import perturbed
from aquatint.diffusion.parameterization import Prediction, input_scale, target
from aquatint.diffusion.schedule import Schedule, add_noise, reindexed, resolution_factor
from aquatint.diffusion.weighting import error_ratio
from aquatint.models.sdxl.generate import PX_PER_LATENT
from aquatint.models.sdxl.model import predict
from aquatint.models.sdxl.process import SDXL_SCALING, LatentScaling


@dataclass(frozen=True)
class Objective:
    """The noise levels, what the UNet predicts there, and how its error counts. Tables are by timestep, (1000,) float32."""

    schedule: Schedule
    prediction: Prediction
    weights: Tensor
    sigma_data: float = 1.0
    loss: Loss = "mse"
    huber_c: Tensor | None = None
    input_perturbation: float = 0.0
    mask_prior_weight: float = 0.0
    scaling: LatentScaling = SDXL_SCALING
    reindexes: bool = False
    """Whether a timestep of a larger picture is a noisier one."""

    def to(self, device: torch.device) -> Objective:
        """The objective with its tables on a device, so that no step has to copy them there."""
        bends = None if self.huber_c is None else self.huber_c.to(device)
        return replace(self, schedule=self.schedule.to(device), weights=self.weights.to(device), huber_c=bends)

    def schedule_at(self, height_latent: int, width_latent: int) -> Schedule:
        """The noise levels of pictures of this size."""
        if not self.reindexes:
            return self.schedule
        factor = resolution_factor(height_latent * PX_PER_LATENT, width_latent * PX_PER_LATENT)
        return reindexed(self.schedule, factor)

    @cached_property
    def errors_of_x0(self) -> Tensor:
        """What divides a squared error of the output to make it one of the picture, (1000,) float32."""
        return error_ratio(self.prediction, self.schedule.snr, self.sigma_data).float()


@dataclass(frozen=True)
class Denoising:
    """What the UNet answered, what it should have, and where that was: output and target (B, 4, h, w) float32."""

    output: Tensor
    target: Tensor
    prior: Tensor | None = None
    """What the frozen base model answered."""


def denoise(
    unet: torch.nn.Module, objective: Objective, batch: Batch, *, autocast: bool, frozen: torch.nn.Module | None = None
) -> Denoising:
    """Noises the latents of a batch and asks the UNet, and `frozen` too if it is given."""
    schedule = objective.schedule_at(*batch.latents.shape[2:])
    alpha, sigma = schedule.at(batch.timesteps)
    noise = batch.noise
    if batch.perturbation is not None:
        noise = perturbed(noise, batch.perturbation, objective.input_perturbation, alpha)
    seen = add_noise(batch.latents, noise, alpha, sigma)
    if objective.prediction == "edm":  # the only one whose input has another scale than 1
        seen = seen * input_scale(objective.prediction, alpha, sigma, sigma_data=objective.sigma_data)
    conditions = (schedule.unet_timesteps(batch.timesteps), batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids)
    wanted = target(objective.prediction, batch.latents, batch.noise, alpha, sigma, sigma_data=objective.sigma_data)
    with half_precision(batch.latents.device, autocast):
        output = predict(unet, seen, *conditions)
        if frozen is None:
            return Denoising(output, wanted)
        with torch.no_grad():
            return Denoising(output, wanted, predict(frozen, seen, *conditions))


def half_precision(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast if the run asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def sample_losses(objective: Objective, batch: Batch, found: Denoising) -> Tensor:
    """The loss of each sample, (B,) float32, before any weight: inside its mask, and outside of it against the base model's answer."""
    c = 0.1 if objective.huber_c is None else objective.huber_c[batch.timesteps]
    if found.prior is None or batch.masks is None:
        return per_sample_loss(objective.loss, found.output, found.target, batch.masks, c=c)
    return masked_loss_with_prior(
        objective.loss, found.output, found.target, found.prior, batch.masks, prior_weight=objective.mask_prior_weight, c=c
    )


def squared_errors(objective: Objective, batch: Batch, found: Denoising) -> Tensor:
    """The mean squared error of each sample's output, (B,) float32, inside its mask: what losses are compared by, whatever is trained."""
    return per_sample_mse(found.output, found.target, batch.masks)
