"""One optimizer step: noise the latents, predict, weigh the error, go down the gradient.

The host only launches it. Whether a step is finite is decided on the device, which leaves it out if it is not, and its numbers
come to the host by themselves, to be read when the next step is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aquatint.data.batch import Batch
from aquatint.optim.clipping import Clipping, is_finite, tensor_norms, whole_norm
from aquatint.optim.create import AnyOptimizer
from aquatint.optim.fused import FusedBackward
from aquatint.training.adaptation import Adaptation
from aquatint.training.ema import Ema
from aquatint.training.free_average import FreeAverage
from aquatint.training.objective import Objective, denoise, sample_losses
from aquatint.training.text_training import TextTraining


@dataclass
class Parts:
    """Everything of a run that has weights or moves them. The tables of its objective are on its device."""

    unet: torch.nn.Module
    optimizer: AnyOptimizer
    ema: Ema | FreeAverage | None
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
    texts: TextTraining | None = None
    """The text encoders if one of them is trained; batches then come with captions alone."""

    def __post_init__(self) -> None:
        self.objective = self.objective.to(self.device)


class Launched(Protocol):
    """A step that was launched, whose numbers may still be on their way."""

    @property
    def samples(self) -> int: ...

    def is_ready(self) -> bool:
        """Whether its numbers are there."""
        ...

    def read(self) -> StepReport:
        """Waits for its numbers."""
        ...


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
    by_part: bool = False
    """Whether a gradient that is not finite leaves out only its own weights: so it is inside the backward pass."""

    def is_ready(self) -> bool:
        """A step that nobody has to wait for can be its own report."""
        return True

    def read(self) -> StepReport:
        """Itself."""
        return self


@dataclass(frozen=True)
class Pending:
    """A step of the UNet that was launched, with what the host knows of it anyway.

    `numbers` (3 + B,) float32 are its loss, its gradient's norm, whether it is finite, and the loss of each sample. They are in main
    memory, and mean something once `arrived` has happened.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    learning_rate: float
    batches: Sequence[Batch]
    by_part: bool

    @property
    def samples(self) -> int:
        return sum(len(batch.names) for batch in self.batches)

    def is_ready(self) -> bool:
        """Whether the numbers are there."""
        return self.arrived is None or self.arrived.query()

    def read(self) -> StepReport:
        """Waits for the numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, finite, *losses = self.numbers.tolist()
        return StepReport(
            loss, norm, self.learning_rate, bool(finite), self.samples,
            names=tuple(name for batch in self.batches for name in batch.names),
            losses=tuple(losses),
            timesteps=tuple(timestep for batch in self.batches for timestep in batch.timesteps.tolist()),
            sources=tuple(source for batch in self.batches for source in batch.sources),
            sizes_hw=tuple((batch.latents.shape[2], batch.latents.shape[3]) for batch in self.batches for _ in batch.names),
            by_part=self.by_part,
        )  # fmt: skip


def train_step(parts: Parts, batches: Sequence[Batch], step: int) -> Pending:
    """Launches one optimizer step over all `batches`, each sample weighing the same whichever batch it is in.

    If the loss or the gradient is not finite, no weight, average or moment is changed. With steps inside the backward pass that holds
    for the loss; a gradient that is not finite leaves out its own unit and the averages, but not the other units.
    The host reads nothing of the device, but with an adaptation, which follows the losses, or with averages in main memory. It may wait
    for it while captions are encoded.
    """
    learning_rate = parts.learning_rate(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)
    samples, loss = sum(len(batch.names) for batch in batches), None
    placed = [parts.adaptation.placed(batch) if parts.adaptation else batch for batch in batches]
    found = []
    for index, batch in enumerate(placed):
        batch = batch.to(parts.device)
        losses, weighted, minimised = losses_of(parts, batch, step)
        share = minimised.sum() / samples
        loss = share.detach() if loss is None else loss + share.detach()
        if parts.fused is not None and index == len(placed) - 1:
            parts.fused.arm(is_finite(loss))
        share.backward()
        found.append((losses.detach(), weighted.detach(), batch.timesteps))
    assert loss is not None, "a step without a batch"
    norm, finite = move_weights(parts, loss)
    if parts.ema is not None:
        parts.ema.update(step, finite)
    parts.optimizer.zero_grad(set_to_none=True)
    if parts.adaptation is not None:
        _, weighted, timesteps = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        parts.adaptation.learn(weighted, timesteps) if finite else parts.adaptation.forget()
    numbers = torch.cat([torch.stack([loss, norm, finite.float()]), *(losses for losses, _, _ in found)])
    return Pending(*sent(numbers), learning_rate, placed, parts.fused is not None)


def sent(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Numbers on their way to main memory, pinned if they come from a GPU, and what happens when they arrive."""
    here = numbers.to("cpu", non_blocking=True)
    if not numbers.is_cuda:
        return here, None
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()
    return here, arrived


def losses_of(parts: Parts, batch: Batch, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample (B,): its loss, that with its weights, and what is minimised."""
    batch = told(parts, batch, step)
    found = denoise(parts.unet, parts.objective, batch, autocast=parts.autocast, frozen=parts.frozen)
    losses = sample_losses(parts.objective, batch, found)
    weighted = parts.objective.weights[batch.timesteps] * batch.loss_weights * losses
    return losses, weighted, weighted if parts.adaptation is None else parts.adaptation.weighed(weighted, batch.timesteps)


def told(parts: Parts, batch: Batch, step: int = 0) -> Batch:
    """The batch as the UNet gets it: with embeddings of its captions, if a text encoder is trained."""
    return batch if parts.texts is None else parts.texts.told(batch, step)


def move_weights(parts: Parts, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the optimizer's step, or ends the one that the backward pass took; returns the gradient's norm and whether all was finite."""
    if parts.fused is not None:
        return parts.fused.finish()
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = tensor_norms(parameters)
    norm = whole_norm(norms)
    finite = is_finite(loss) & is_finite(norm)
    parts.clipping.clip_(parameters, norms, norm)
    parts.clipping.remember(norm, finite)
    parts.optimizer.step(finite=finite)
    return norm, finite


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together, accumulated in float32 whatever their dtype."""
    return whole_norm(tensor_norms(parameters))
