"""A loss that learns how uncertain each noise level is (arXiv 2312.02696)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aquatint.diffusion.schedule import Schedule
from aquatint.utils.seeds import generator

NUM_FEATURES = 128
LARGEST_VE_SIGMA = 20000.0


class Uncertainty(nn.Module):
    """u(timestep): the logarithm of the loss to expect, linear in 128 random Fourier features of ln(ve_sigma) / 4.

    It starts at 0, where the loss is as it was. Its weights are float32, and want a learning rate of their own, no weight decay,
    no part in the clipping of the model's gradient, and no average.
    """

    features: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        rng = generator(0, "uncertainty-features", 0)
        draws = rng.standard_normal(NUM_FEATURES), rng.random(NUM_FEATURES)
        frequencies, phases = (torch.from_numpy(2 * math.pi * draw) for draw in draws)
        noise = schedule.ve_sigmas.clamp(max=LARGEST_VE_SIGMA).log() / 4
        features = math.sqrt(2) * torch.cos(noise[:, None] * frequencies + phases)
        self.register_buffer("features", features.float(), persistent=False)  # follows from the schedule
        self.weight = nn.Parameter(torch.zeros(NUM_FEATURES))

    def forward(self, timesteps: Tensor) -> Tensor:
        """u of int64 timesteps (B,), (B,) float32."""
        with torch.autocast(timesteps.device.type, enabled=False):
            u: Tensor = self.features[timesteps] @ self.weight / NUM_FEATURES**0.5
        return u


def uncertain_loss(losses: Tensor, u: Tensor) -> Tensor:
    """loss / exp(u) + u, (B,): least at u = ln(loss), where every noise level pulls alike. It may be negative: report the loss itself."""
    return losses / u.exp() + u
