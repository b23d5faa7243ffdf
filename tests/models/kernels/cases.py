"""Sizes of pictures and groups, and numbers to fill them with."""

import torch

EPS = 1e-5
# (batch, channels, height, width), groups: 10, 20 and 40 channels to a group as in SDXL, 3 that no tile divides by; several tiles of
# places, and more of them than are summed at once
NORMS = {
    "10 channels": ((1, 40, 9, 11), 4),
    "20 channels": ((2, 80, 3, 5), 4),
    "40 channels": ((2, 80, 7, 7), 2),
    "32 groups": ((1, 96, 13, 5), 32),
    "one place": ((2, 64, 1, 1), 4),
    "65 tiles": ((1, 4, 64, 65), 2),
}


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
