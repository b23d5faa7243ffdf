"""How much each noise level counts in the loss.

Every scheme is written as a weight on the error of x0, the one quantity that all parameterisations share, and converted:
|dE|^2 = SNR |dX0|^2 and |dX0|^2 = sigma^2 |dV|^2, hence w_epsilon = w_x0 / SNR and w_v = w_x0 / (1 + SNR).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aquatint.diffusion.parameterization import Prediction

Weighting = Literal["none", "min_snr", "clamped_v"]


def loss_weights(weighting: Weighting, prediction: Prediction, snr: Tensor, *, gamma: float, floor: float) -> Tensor:
    """Weight of the squared error of the UNet's output at each timestep, (1000,) float32, from `Schedule.snr`.

    `floor` is the least weight of min_snr where some SNR is 0: that timestep would never be trained otherwise.
    Raises ValueError for epsilon where some SNR is 0.
    """
    pure_noise = bool((snr == 0).any())
    if prediction == "epsilon" and pure_noise:
        raise ValueError("epsilon cannot be trained where the SNR is 0; zero terminal SNR needs v_prediction")
    if weighting == "none":
        return torch.ones_like(snr, dtype=torch.float32)
    weights_x0 = min_snr(snr, gamma) if weighting == "min_snr" else clamped_v(snr, gamma)
    weights = weights_x0 / snr if prediction == "epsilon" else weights_x0 / (1 + snr)
    if weighting == "min_snr" and pure_noise:
        weights = weights.clamp(min=floor)
    return weights.float()


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Weight on x0 that follows the SNR up to gamma (arXiv 2303.09556)."""
    return snr.clamp(max=gamma)


def clamped_v(snr: Tensor, gamma: float) -> Tensor:
    """Weight on x0 that follows SNR + 1 up to gamma: plain v at high noise, also at SNR 0, and min-SNR's decay at low noise."""
    return (snr + 1).clamp(max=gamma)
