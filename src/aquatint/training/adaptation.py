"""Loss weights and timesteps that follow the loss itself. What they have learned is part of a checkpoint, so that a resume is exact.

Each is asked three things at every optimizer step: at which timesteps its batches are trained, what their losses weigh, and, once the
step is made, to take note of them. A step that is not finite is not to be learned from, so the host waits for each step here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from aquatint.data.batch import Batch
from aquatint.diffusion import adaptive
from aquatint.diffusion.importance import empty_history, importance_weights, loss_aware, remember
from aquatint.diffusion.schedule import NUM_TIMESTEPS, Schedule
from aquatint.diffusion.timesteps import Probabilities, Spread, draw_timesteps
from aquatint.diffusion.uncertainty import Uncertainty, uncertain_loss


class Adaptation(Protocol):
    """See the module."""

    def placed(self, batch: Batch) -> Batch:
        """The batch at the timesteps where it is to be trained."""
        ...

    def weighed(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        """What the step minimises the mean of, (B,), from the losses (B,) with the weights of their timesteps."""
        ...

    def learn(self, losses: Tensor, timesteps: Tensor) -> None:
        """Takes note of all losses of a step, as `weighed` got them."""
        ...

    def forget(self) -> None:
        """The step was left out: nothing of it is to be taken note of."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What is saved, and restored in place; CPU or device tensors of fixed shapes."""
        ...


class LearnedUncertainty:
    """`weighting = "learned"`: each loss is divided by what is to be expected at its noise level, which is learned (arXiv 2312.02696)."""

    def __init__(self, schedule: Schedule, learning_rate: float, device: torch.device) -> None:
        self.module = Uncertainty(schedule).to(device)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=learning_rate)
        weight = self.module.weight
        zeros = {"exp_avg": torch.zeros_like(weight.detach()), "exp_avg_sq": torch.zeros_like(weight.detach())}
        self.optimizer.state[weight] = {"step": torch.tensor(0.0), **zeros}

    def placed(self, batch: Batch) -> Batch:
        return batch

    def weighed(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        return uncertain_loss(losses, self.module(timesteps))

    def learn(self, losses: Tensor, timesteps: Tensor) -> None:
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.module.weight.detach(), **self.optimizer.state[self.module.weight]}


class AdaptiveWeights:
    """`weighting = "adaptive"`: each loss is divided by the recent mean of its range of timesteps."""

    def __init__(self, num_ranges: int, decay: float, density: Probabilities, device: torch.device) -> None:
        self.decay = decay
        self.density = torch.from_numpy(density).to(device)
        self.state = adaptive.no_losses(num_ranges).to(device)

    def placed(self, batch: Batch) -> Batch:
        return batch

    def weighed(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        return losses * adaptive.adaptive_weights(self.state, self.density)[timesteps]

    def learn(self, losses: Tensor, timesteps: Tensor) -> None:
        sums = adaptive.range_sums(timesteps, losses, self.state.shape[1])
        self.state.copy_(adaptive.update(self.state, sums, decay=self.decay))

    def forget(self) -> None:
        pass

    def tensors(self) -> Mapping[str, Tensor]:
        return {"state": self.state}


class Importance:
    """`timesteps.importance`: levels with a large loss come more often and weigh less (arXiv 2102.09672, section 3.3).

    Timesteps are drawn anew from the same numbers, position by position, so that they depend on the positions and the history alone.
    """

    def __init__(self, num_ranges: int, base: Probabilities, *, seed: int, samples_per_step: int, spread: Spread) -> None:
        self.base, self.seed, self.samples_per_step, self.spread = base, seed, samples_per_step, spread
        self.history = torch.from_numpy(empty_history(num_ranges))

    @property
    def probabilities(self) -> Probabilities:
        return loss_aware(self.history.numpy(), self.base)

    def placed(self, batch: Batch) -> Batch:
        timesteps = draw_timesteps(self.seed, batch.positions, self.samples_per_step, self.probabilities, spread=self.spread)
        return replace(batch, timesteps=timesteps.to(batch.timesteps.device))

    def weighed(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        weights = torch.from_numpy(importance_weights(self.probabilities, self.base)).to(losses.device, torch.float32)
        return losses * weights[timesteps]

    def learn(self, losses: Tensor, timesteps: Tensor) -> None:
        ranges = timesteps.cpu().numpy() * len(self.history) // NUM_TIMESTEPS
        found = remember(self.history.numpy(), ranges.tolist(), losses.cpu().tolist())
        self.history.copy_(torch.from_numpy(np.ascontiguousarray(found)))

    def forget(self) -> None:
        pass

    def tensors(self) -> Mapping[str, Tensor]:
        return {"history": self.history}
