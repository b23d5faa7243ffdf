"""The loss of a sample."""

from __future__ import annotations

from torch import Tensor


def per_sample_mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over C, H, W of each sample, (B,) float32: weights are per sample, so the batch is not averaged here."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)
