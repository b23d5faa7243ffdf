"""Noise that depends on the sample alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aquatint.utils.seeds import generator


def draw_noise(seed: int, stream: str, positions: Sequence[int], shape_chw: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B, C, H, W) float32, each sample from the generator of its own global position."""
    noise = np.empty((len(positions), *shape_chw), dtype=np.float32)
    for sample, position in zip(noise, positions, strict=True):
        generator(seed, stream, position).standard_normal(dtype=np.float32, out=sample)
    return torch.from_numpy(noise)
