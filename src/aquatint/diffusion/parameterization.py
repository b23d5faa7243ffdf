"""What the UNet predicts, and how to read x0 and the noise from it.

- "epsilon" is the noise e itself (arXiv 2006.11239).
- "v_prediction" is v = alpha e - sigma x0 (arXiv 2202.00512, section 4), which stays meaningful where the input is pure noise.
- "x0" is the picture. It says nothing about the noise where there is none.
- "edm" is F of arXiv 2206.00364 (section 5) with its sigma_data sd: x0 = c_skip x + c_out F, and the UNet sees c_in x. With
  r^2 = sigma^2 + (alpha sd)^2 that is F = (sigma x0 - alpha sd^2 e) / (r sd), finite at every noise level; at sd = 1 it is -v.
- "flow" is u = e - x0 (arXiv 2209.03003), the velocity from the picture to the noise.

Epsilon, v, x0 and F go with the variance preserving x_t = alpha x0 + sigma e with alpha^2 + sigma^2 = 1, the flow with alpha + sigma = 1
(`flow_schedule`); epsilon, x0 and u can be read from either. All inputs are (B, C, H, W), with alpha and sigma from `Schedule.at`;
all results are float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "x0", "edm", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def target(prediction: Prediction, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 1.0) -> Tensor:
    """What a perfect UNet would answer: e, v = alpha e - sigma x0, x0, F, or u = e - x0."""
    if prediction == "epsilon":
        return noise.float()
    if prediction == "v_prediction":
        return alpha * noise.float() - sigma * latents.float()
    if prediction == "x0":
        return latents.float()
    if prediction == "edm":
        spread = sigma_data * _edm_norm(alpha, sigma, sigma_data)
        return sigma / spread * latents.float() - alpha * sigma_data**2 / spread * noise.float()
    return noise.float() - latents.float()


def to_x0(
    prediction: Prediction, output: Tensor, noisy_latents: Tensor, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 1.0
) -> Tensor:
    """The clean latents that an output implies.

    Raises ValueError for epsilon where alpha is 0: pure noise says nothing about x0.
    """
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError("epsilon does not determine x0 where the SNR is 0; zero terminal SNR needs v_prediction")
        return (noisy_latents.float() - sigma * output.float()) / alpha
    if prediction == "v_prediction":
        return alpha * noisy_latents.float() - sigma * output.float()
    if prediction == "x0":
        return output.float()
    if prediction == "edm":
        norm = _edm_norm(alpha, sigma, sigma_data)
        return alpha * (sigma_data / norm) ** 2 * noisy_latents.float() + sigma * sigma_data / norm * output.float()
    return (noisy_latents.float() - sigma * output.float()) / (alpha + sigma)


def to_epsilon(
    prediction: Prediction, output: Tensor, noisy_latents: Tensor, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 1.0
) -> Tensor:
    """The noise that an output implies.

    Raises ValueError for x0 where sigma is 0: a clean picture says nothing about the noise.
    """
    if prediction == "epsilon":
        return output.float()
    if prediction == "v_prediction":
        return sigma * noisy_latents.float() + alpha * output.float()
    if prediction == "x0":
        if (sigma == 0).any():
            raise ValueError("x0 does not determine the noise where there is none")
        return (noisy_latents.float() - alpha * output.float()) / sigma
    if prediction == "edm":
        norm = _edm_norm(alpha, sigma, sigma_data)
        return sigma / norm**2 * noisy_latents.float() - alpha * sigma_data / norm * output.float()
    return (noisy_latents.float() + alpha * output.float()) / (alpha + sigma)


def convert(
    prediction: Prediction,
    wanted: Prediction,
    output: Tensor,
    noisy_latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 1.0,
) -> Tensor:
    """What a UNet of another prediction would have answered in the place of `output`.

    Raises ValueError where the output does not hold it: see `to_x0` and `to_epsilon`.
    """
    if prediction == wanted:
        return output.float()
    latents = noise = output
    if wanted != "epsilon":
        latents = to_x0(prediction, output, noisy_latents, alpha, sigma, sigma_data=sigma_data)
    if wanted != "x0":
        noise = to_epsilon(prediction, output, noisy_latents, alpha, sigma, sigma_data=sigma_data)
    return target(wanted, latents, noise, alpha, sigma, sigma_data=sigma_data)


def input_scale(prediction: Prediction, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 1.0) -> Tensor:
    """What the noisy latents are multiplied by on their way into the UNet: 1, or for "edm" what brings their variance to 1."""
    return 1 / _edm_norm(alpha, sigma, sigma_data) if prediction == "edm" else torch.ones_like(alpha)


class Preconditioning(NamedTuple):
    """D(x) = skip x + out F(in x, noise), with the loss weight of |D - x0|^2 that makes all levels count alike in F."""

    skip: Tensor
    out: Tensor
    scale_in: Tensor
    noise: Tensor
    weight: Tensor


def edm_preconditioning(ve_sigma: Tensor, sigma_data: float) -> Preconditioning:
    """c_skip, c_out, c_in, c_noise and lambda of finite ve_sigmas above 0, for x = x0 + ve_sigma e (arXiv 2206.00364, table 1)."""
    total = ve_sigma.square() + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        out=ve_sigma * sigma_data / total.sqrt(),
        scale_in=total.rsqrt(),
        noise=ve_sigma.log() / 4,
        weight=total / (ve_sigma * sigma_data).square(),
    )


def flow_from_v(v: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
    """u = v / d + (2 t - 1) x / d^2 with d = hypot(1 - t, t): the velocity of a flow from the v at the same ve_sigma t / (1 - t).

    `x_flow` = (1 - t) x0 + t e is the flow's noisy input; a v-predicting UNet sees x_flow / d, at alpha = (1 - t) / d, sigma = t / d.
    """
    norm = torch.hypot(1 - t, t)
    return v / norm + (2 * t - 1) * x_flow / norm.square()


def v_from_flow(u: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
    """The inverse of `flow_from_v`."""
    norm = torch.hypot(1 - t, t)
    return norm * u - (2 * t - 1) * x_flow / norm


def _edm_norm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Standard deviation of x_t where that of x0 is sigma_data."""
    return torch.hypot(sigma, alpha * sigma_data)
