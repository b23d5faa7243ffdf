"""Noise that depends on the sample alone.

`draw_noise` is what training adds and what sampling starts from. The others change it for training: offset and pyramid noise
add slow patterns to it (and so go with no zero terminal SNR, whose sampler starts from plain noise); input perturbation and immiscible
pairing leave its distribution alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aquatint.diffusion.assignment import cheapest_assignment
from aquatint.utils.seeds import generator

PYRAMID_LEVELS = 10
PYRAMID_RATIO = (2.0, 4.0)


def draw_noise(seed: int, stream: str, positions: Sequence[int], shape_chw: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B, C, H, W) float32, each sample from the generator of its own global position."""
    noise = np.empty((len(positions), *shape_chw), dtype=np.float32)
    for sample, position in zip(noise, positions, strict=True):
        generator(seed, stream, position).standard_normal(dtype=np.float32, out=sample)
    return torch.from_numpy(noise)


def draw_offset(seed: int, positions: Sequence[int], channels: int) -> Tensor:
    """What offset noise adds to whole channels, before it is multiplied by its strength: standard normal (B, C, 1, 1)."""
    return draw_noise(seed, "offset-noise", positions, (channels, 1, 1))


def offset(noise: Tensor, shift: Tensor, strength: float | Tensor) -> Tensor:
    """Noise whose channel means vary too: e + c z, with z from `draw_offset` and a strength c, or one per sample and channel.

    (Offset noise; SDXL's last stage was trained with c = 0.05, arXiv 2307.01952.)
    """
    return noise + strength * shift


def adaptive_strength(latents: Tensor, strength: float, slope: float) -> Tensor:
    """Offset strengths (B, C, 1, 1) that grow with a picture's own channel means: c + k |mean|, not below 0. (sd-scripts' rule.)"""
    return (strength + slope * latents.float().mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def pyramid(noise: Tensor, seed: int, positions: Sequence[int], discount: float, *, levels: int = PYRAMID_LEVELS) -> Tensor:
    """Noise with slow patterns: level i adds noise of 1 / r^i the size, enlarged, times discount^i; then the variance is brought to 1.

    The ratio r is drawn from 2..4 for each sample, and the variance is each sample's own. Levels end at one of a single row or
    column. (Multi-resolution noise, "pyramid noise"; the first level is i = 1: level 0 would only repeat the noise itself.)
    """
    samples = zip(noise, positions, strict=True)
    return torch.stack([_pyramid_of_one(sample, seed, position, discount, levels) for sample, position in samples])


def _pyramid_of_one(noise: Tensor, seed: int, position: int, discount: float, levels: int) -> Tensor:
    """The pyramid of one sample (C, H, W)."""
    rng = generator(seed, "pyramid-noise", position)
    ratio = rng.uniform(*PYRAMID_RATIO)
    channels, height, width = noise.shape
    total = noise.clone()
    for level in range(1, levels + 1):
        small = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        drawn = torch.from_numpy(rng.standard_normal((1, channels, *small), dtype=np.float32))
        total += discount**level * interpolate(drawn, size=(height, width), mode="bilinear", align_corners=False)[0]
        if min(small) == 1:
            break
    return total / total.std()


def perturbed(noise: Tensor, perturbation: Tensor, gamma: float, alpha: Tensor) -> Tensor:
    """The noise to put into x_t, while the target keeps the one without: e + gamma xi (arXiv 2301.11706, "input perturbation").

    `perturbation` is other standard normal noise. Where alpha is 0 there is none: sampling starts from plain noise.
    """
    return noise + torch.where(alpha == 0, 0.0, gamma) * perturbation


def immiscible(latents: Tensor, noise: Tensor) -> Tensor:
    """The same noises, each with the picture of the batch that makes the sum of squared distances least (arXiv 2406.12303).

    It depends on who is in the batch, as no other draw does. The distribution of the noise is as it was.
    """
    distances = -(latents.flatten(1).double() @ noise.flatten(1).double().T)  # less what every assignment shares: their own squares
    return noise[torch.from_numpy(cheapest_assignment(distances.cpu().numpy())).to(noise.device)]
