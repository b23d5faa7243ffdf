"""One optimizer step: noise the latents, predict, weigh the error, go down the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aquatint.data.batch import Batch
from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm
from aquatint.optim.fused import FusedBackward
from aquatint.training.adaptation import Adaptation
from aquatint.training.ema import Ema
from aquatint.training.objective import Objective, denoise, sample_losses


@dataclass
class Parts:
    """Everything of a run that has weights or moves them."""

    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    objective: Objective
    learning_rate: Callable[[int], float]  # optimizer step, from 0 -> learning rate
    autocast: bool
    clipping: Clipping
    device: torch.device
    adaptation: Adaptation | None = None
    frozen: torch.nn.Module | None = None
    """The base model as it was, for the loss outside of masks."""
    fused: FusedBackward | None = None
    """Steps the optimizer from inside the backward pass."""


@dataclass(frozen=True)
class StepReport:
    """What one step did. `loss` is the weighted mean over its samples; `gradient_norm` is before clipping.

    `losses` are those of each sample, before any weight, with its timestep, its source and the size of its latents.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    samples: int
    names: tuple[str, ...]
    losses: tuple[float, ...] = ()
    timesteps: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    sizes_hw: tuple[tuple[int, int], ...] = ()


def train_step(parts: Parts, batches: Sequence[Batch], step: int) -> StepReport:
    """One optimizer step over all `batches`, each sample weighing the same whichever batch it is in.

    If the loss or the gradient is not finite, nothing is changed: `finite` is then False. With steps inside the backward pass that
    holds for the loss; a gradient that is not finite leaves out its own tensor and the average, but not tensors stepped before it.
    """
    learning_rate = parts.learning_rate(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = learning_rate
    samples = sum(len(batch.names) for batch in batches)
    loss = torch.zeros((), device=parts.device)
    placed = [parts.adaptation.placed(batch) if parts.adaptation else batch for batch in batches]
    found = []
    for index, batch in enumerate(placed):
        batch = batch.to(parts.device)
        losses, weighted, minimised = losses_of(parts, batch)
        share = minimised.sum() / samples
        loss += share.detach()
        if parts.fused is not None and index == len(placed) - 1 and bool(loss.isfinite()):
            parts.fused.arm()
        share.backward()
        found.append((losses.detach(), weighted.detach(), batch.timesteps))
    norm, finite = move_weights(parts, loss)
    if finite and parts.ema is not None:
        parts.ema.update(step)
    parts.optimizer.zero_grad(set_to_none=True)
    losses, weighted, timesteps = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    if parts.adaptation is not None:
        parts.adaptation.learn(weighted, timesteps) if finite else parts.adaptation.forget()
    return StepReport(
        loss.item(), norm.item(), learning_rate, finite, samples,
        names=tuple(name for batch in batches for name in batch.names),
        losses=tuple(losses.tolist()),
        timesteps=tuple(timesteps.tolist()),
        sources=tuple(source for batch in batches for source in batch.sources),
        sizes_hw=tuple((batch.latents.shape[2], batch.latents.shape[3]) for batch in batches for _ in batch.names),
    )  # fmt: skip


def losses_of(parts: Parts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each sample (B,): its loss, that with its weights, and what is minimised."""
    found = denoise(parts.unet, parts.objective, batch, autocast=parts.autocast, frozen=parts.frozen)
    losses = sample_losses(parts.objective, batch, found)
    weighted = parts.objective.weights.to(parts.device)[batch.timesteps] * batch.loss_weights * losses
    return losses, weighted, weighted if parts.adaptation is None else parts.adaptation.weighed(weighted, batch.timesteps)


def move_weights(parts: Parts, loss: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Takes the optimizer's step, or ends the one that the backward pass took; returns the gradient's norm and whether all was finite."""
    if parts.fused is not None and parts.fused.armed:
        return parts.fused.finish()
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = tensor_norms(parameters)
    norm = whole_norm(norms)
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if finite:
        parts.clipping.clip_(parameters, norms)
        parts.clipping.remember(norm)
        parts.optimizer.step()
    return norm, finite


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients together, accumulated in float32 whatever their dtype."""
    return whole_norm(tensor_norms(parameters))
