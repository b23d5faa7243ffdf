"""What the UNet predicts, and how to read x0 and the noise from it.

"epsilon" is the noise e itself (arXiv 2006.11239). "v_prediction" is v = alpha e - sigma x0 (arXiv 2202.00512, section 4), which
stays meaningful where the input is pure noise. All inputs are (B, C, H, W), with alpha and sigma from `Schedule.at`; all
results are float32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


def target(prediction: Prediction, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect UNet would answer: e, or v = alpha e - sigma x0."""
    if prediction == "epsilon":
        return noise.float()
    return alpha * noise.float() - sigma * latents.float()


def to_x0(prediction: Prediction, output: Tensor, noisy_latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that an output implies: (x_t - sigma e) / alpha, or alpha x_t - sigma v.

    Raises ValueError for epsilon where alpha is 0: pure noise says nothing about x0.
    """
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError("epsilon does not determine x0 where the SNR is 0; zero terminal SNR needs v_prediction")
        return (noisy_latents.float() - sigma * output.float()) / alpha
    return alpha * noisy_latents.float() - sigma * output.float()


def to_epsilon(prediction: Prediction, output: Tensor, noisy_latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that an output implies: e itself, or sigma x_t + alpha v."""
    if prediction == "epsilon":
        return output.float()
    return sigma * noisy_latents.float() + alpha * output.float()
