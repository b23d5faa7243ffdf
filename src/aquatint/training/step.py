"""One optimizer step: noise the latents, predict, weigh the error, go down the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aquatint.data.batch import Batch
from aquatint.diffusion.loss import per_sample_mse
from aquatint.diffusion.parameterization import Prediction, target
from aquatint.diffusion.schedule import Schedule, add_noise
from aquatint.models.sdxl.generate import predict
from aquatint.training.ema import Ema


@dataclass(frozen=True)
class Objective:
    """What is learned: the schedule, what the UNet predicts, and the loss weight of each timestep (1000,) float32."""

    schedule: Schedule
    prediction: Prediction
    weights: torch.Tensor


@dataclass
class Parts:
    """Everything of a run that has weights or moves them."""

    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    objective: Objective
    learning_rate: Callable[[int], float]  # optimizer step, from 0 -> learning rate
    autocast: bool
    clip_norm: float
    device: torch.device


@dataclass(frozen=True)
class StepReport:
    """What one step did. `loss` is the weighted mean over its samples; `gradient_norm` is before clipping."""

    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    samples: int
    names: tuple[str, ...]


def prediction_error(parts: Parts, batch: Batch) -> torch.Tensor:
    """The unweighted squared error of each sample, (B,) float32, inside its mask. Noising and target are float32 whatever the model is."""
    objective = parts.objective
    alpha, sigma = objective.schedule.at(batch.timesteps)
    noisy_latents = add_noise(batch.latents, batch.noise, alpha, sigma)
    with half_precision(parts):
        output = predict(parts.unet, noisy_latents, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids)
    return per_sample_mse(output, target(objective.prediction, batch.latents, batch.noise, alpha, sigma), batch.masks)


def half_precision(parts: Parts) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast if the run asks for it."""
    return torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.autocast)


def train_step(parts: Parts, batches: Sequence[Batch], step: int) -> StepReport:
    """One optimizer step over all `batches`, each sample weighing the same whichever batch it is in.

    If the loss or the gradient is not finite, nothing is changed: `finite` is then False.
    """
    samples = sum(len(batch.names) for batch in batches)
    loss = torch.zeros((), device=parts.device)
    for batch in batches:
        batch = batch.to(parts.device)
        weights = parts.objective.weights.to(parts.device)[batch.timesteps] * batch.loss_weights
        share = (weights * prediction_error(parts, batch)).sum() / samples
        share.backward()
        loss += share.detach()
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(parameters)
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    learning_rate = parts.learning_rate(step)
    if finite:
        if parts.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, parts.clip_norm, norm)
        for group in parts.optimizer.param_groups:
            group["lr"] = learning_rate
        parts.optimizer.step()
        if parts.ema is not None:
            parts.ema.update(step)
    parts.optimizer.zero_grad(set_to_none=True)
    names = tuple(name for batch in batches for name in batch.names)
    return StepReport(loss.item(), norm.item(), learning_rate, finite, samples, names)


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients together, accumulated in float32 whatever their dtype."""
    return torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]).norm()
