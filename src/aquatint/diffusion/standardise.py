"""Latents of mean 0 and variance 1 in each channel, in a file that every program reads as before.

Programs know one number about SDXL's latents: z = 0.13025 raw. To train on z' = (raw - mean) / std instead, and still be understood, the
autoencoder's own 1x1 convolutions are changed so that 0.13025 times its new raw latents is z'. Pictures stay as they were. The latents
do not: this suits models that are trained for long, and breaks where other autoencoders, previews or latent upscalers are put in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LatentConvs(NamedTuple):
    """The 1x1 convolutions next to the latents: encoder to mean and log-variance (8, 8, 1, 1), and latents to decoder (4, 4, 1, 1)."""

    quant_weight: Tensor
    quant_bias: Tensor
    post_quant_weight: Tensor
    post_quant_bias: Tensor


def fold_standardisation(convs: LatentConvs, mean: Tensor, std: Tensor, scaling_factor: float) -> LatentConvs:
    """The convolutions of an autoencoder whose raw latents, times the scaling factor, have what was `mean` and `std` as 0 and 1.

    `mean` and `std` (4,) are those of the old raw latents. Computed in float64, of the convolutions' dtype. With g = scaling_factor std:
    mean rows (W / g, (b - mean) / g), log-variance rows b - 2 ln g, and back W diag(g), b + W mean.
    """
    quant_weight, quant_bias, post_weight, post_bias = (tensor.double() for tensor in convs)
    mean, gain = mean.double(), scaling_factor * std.double()
    channels = len(mean)
    rows = torch.cat([gain, torch.ones_like(gain)])
    shift = torch.cat([mean / gain, 2 * gain.log()])
    folded = (
        quant_weight / rows.view(-1, 1, 1, 1),
        quant_bias / rows - shift,
        post_weight * gain.view(1, channels, 1, 1),
        post_bias + post_weight.view(channels, channels) @ mean,
    )
    return LatentConvs(*(new.to(old.dtype) for new, old in zip(folded, convs, strict=True)))
