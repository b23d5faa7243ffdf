"""How much each noise level counts in the loss.

Every scheme is written as a weight on the error of x0, the one quantity that all parameterisations share, and converted:
|dE|^2 = SNR |dX0|^2, |dV|^2 = (1 + SNR) |dX0|^2, |dF|^2 = (sd^-2 + SNR) |dX0|^2 and |dU|^2 = (1 + sqrt(SNR))^2 |dX0|^2 (which is
|dX0|^2 / t^2), hence w_epsilon = w_x0 / SNR, w_v = w_x0 / (1 + SNR), and so on.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from aquatint.diffusion.parameterization import Prediction
from aquatint.diffusion.schedule import RESCALED_ALPHA_BAR

Weighting = Literal[
    "none",
    "min_snr",
    "soft_min_snr",
    "clamped_v",
    "truncated",
    "debiased",
    "p2",
    "cosmap",
    "sigma_sqrt",
    "like_epsilon",
    "like_v",
]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
SIGMA_SQRT_LIMIT = 1e4


def loss_weights(
    weighting: Weighting,
    prediction: Prediction,
    snr: Tensor,
    *,
    gamma: float,
    floor: float,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
    sigma_data: float = 1.0,
) -> Tensor:
    """Weight of the squared error of the UNet's output at each timestep, (1000,) float32, from `Schedule.snr`.

    `floor` is the least weight of any timestep if the scheme gives 0 to one whose SNR is 0, as min_snr, soft_min_snr, debiased, p2
    and like_epsilon do: that timestep would never be trained otherwise.
    Raises ValueError for epsilon where some SNR is 0; for a table that ends in a sampler's stand-in for 0; and for sigma_sqrt
    as that function does.
    """
    pure_noise = bool((snr == 0).any())
    if prediction == "epsilon" and pure_noise:
        raise ValueError("epsilon cannot be trained where the SNR is 0; zero terminal SNR needs v_prediction")
    if 0 < snr[-1] < RESCALED_ALPHA_BAR:
        raise ValueError("this table has a sampler's stand-in for an SNR of 0: training uses the exact zero")
    if weighting == "none":
        return torch.ones_like(snr, dtype=torch.float32)
    weights = weights_x0(weighting, snr, gamma=gamma, p2_k=p2_k, p2_gamma=p2_gamma) / error_ratio(prediction, snr, sigma_data)
    if pure_noise and bool((weights[snr == 0] == 0).any()):
        weights = weights.clamp(min=floor)
    return weights.float()


def weights_x0(weighting: Weighting, snr: Tensor, *, gamma: float = 5.0, p2_k: float = 1.0, p2_gamma: float = 1.0) -> Tensor:
    """The weight of the squared error of x0 that a scheme stands for, of the shape and type of `snr`. Raises ValueError for "none"."""
    match weighting:
        case "min_snr":
            return min_snr(snr, gamma)
        case "soft_min_snr":
            return soft_min_snr(snr, gamma)
        case "clamped_v":
            return clamped_v(snr, gamma)
        case "truncated":
            return truncated(snr)
        case "debiased":
            return debiased(snr)
        case "p2":
            return p2(snr, p2_k, p2_gamma)
        case "cosmap":
            return cosmap(snr)
        case "sigma_sqrt":
            return sigma_sqrt(snr)
        case "like_epsilon":
            return snr
        case "like_v":
            return snr + 1
        case "none":
            raise ValueError('"none" is no weight on x0: it leaves every output as it is')


def error_ratio(prediction: Prediction, snr: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The squared error of an output over the squared error of the x0 that it implies."""
    match prediction:
        case "epsilon":
            return snr
        case "v_prediction":
            return 1 + snr
        case "x0":
            return torch.ones_like(snr)
        case "edm":
            return snr + sigma_data**-2
        case "flow":
            return (1 + snr.sqrt()).square()


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Weight on x0 that follows the SNR up to gamma (arXiv 2303.09556)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Weight on x0 that bends from the SNR towards gamma: SNR gamma / (SNR + gamma).

    It is 1 / (ve_sigma^2 + sigma_data^2) with sigma_data = gamma^-1/2 (k-diffusion's "soft-min-snr").
    """
    return snr * gamma / (snr + gamma)


def clamped_v(snr: Tensor, gamma: float) -> Tensor:
    """Weight on x0 that follows SNR + 1 up to gamma: plain v at high noise, also at SNR 0, and min-SNR's decay at low noise."""
    return (snr + 1).clamp(max=gamma)


def truncated(snr: Tensor) -> Tensor:
    """Weight on x0 that follows the SNR down to 1 (arXiv 2202.00512, section 4)."""
    return snr.clamp(min=1)


def debiased(snr: Tensor) -> Tensor:
    """Weight on x0 that follows the root of the SNR (arXiv 2310.08442)."""
    return snr.sqrt()


def p2(snr: Tensor, k: float, gamma: float) -> Tensor:
    """Weight on x0 of SNR / (k + SNR)^gamma (arXiv 2204.00227)."""
    return snr / (k + snr) ** gamma


def cosmap(snr: Tensor) -> Tensor:
    """Weight on x0 that is 2 / (pi (1 - 2 t + 2 t^2)) on the velocity of a flow (arXiv 2403.03206), at its t = 1 / (1 + sqrt(SNR))."""
    return 2 / math.pi * (1 + snr.sqrt()) ** 4 / (1 + snr)


def sigma_sqrt(snr: Tensor) -> Tensor:
    """Weight on x0 that is t^-2 on the velocity of a flow at t = 1 / (1 + sqrt(SNR)), without bound towards clean pictures.

    Raises ValueError where that is above 10,000, at t < 0.01: a handful of samples would decide every step.
    """
    root = 1 + snr.sqrt()
    if (largest := root.max().item() ** 2) > SIGMA_SQRT_LIMIT:
        raise ValueError(
            f"sigma_sqrt would weigh the cleanest level {largest:,.0f} times as much as pure noise, and a handful of samples would "
            "decide every step: take cosmap"
        )
    return root**4


def normalised(weights: Tensor, density: Tensor) -> Tensor:
    """The weights (1000,), scaled so that their mean is 1 where timesteps come with these probabilities (1000,). Float32.

    So learning rates can be compared between weightings. Raises ValueError where no timestep that comes has a weight.
    """
    mean = (weights.double() * density.double()).sum() / density.double().sum()
    if not mean > 0:
        raise ValueError("the timesteps that are trained have no weight")
    return (weights.double() / mean).float()
