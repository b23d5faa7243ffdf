"""A discriminator that judges patches: PatchGAN of pix2pix (arXiv 1611.07004, section 3.2.2), as VQGAN trains with it.

It gives a number for each patch of about 70 pixels a side, high where that looks like part of a real picture.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from aquatint.utils.seeds import generator

CHANNELS = 64
DOWNSAMPLINGS = 3
DEVIATION = 0.02  # of fresh weights (arXiv 1611.07004, section 6.2)
MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPSILON = 1e-4


def build_discriminator(seed: int, *, channels: int = CHANNELS, downsamplings: int = DOWNSAMPLINGS) -> nn.Sequential:
    """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w). Batch norms use their own batch always, so they have nothing to remember."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    width = channels
    for number in range(1, downsamplings + 1):
        before, width = width, channels * min(2**number, 8)
        stride = 2 if number < downsamplings else 1
        layers += [
            nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
            nn.LeakyReLU(0.2),
        ]
    discriminator = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
    _draw_weights(discriminator, seed)
    return discriminator


@torch.no_grad()
def _draw_weights(discriminator: nn.Module, seed: int) -> None:
    """Convolutions around 0, norms around 1, biases 0."""
    for position, (name, parameter) in enumerate(discriminator.named_parameters()):
        if name.endswith("bias"):
            parameter.zero_()
            continue
        values = generator(seed, "discriminator", position).standard_normal(prod(parameter.shape), dtype="float32")
        parameter.copy_(torch.from_numpy(values).view(parameter.shape) * DEVIATION + (1.0 if parameter.dim() == 1 else 0.0))


def generator_loss(on_fake: Tensor) -> Tensor:
    """What the decoder wants to be low: minus the mean verdict on its pictures."""
    return -on_fake.mean()


def discriminator_loss(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """The hinge loss (arXiv 1705.02894, section 3): verdicts on real pictures above 1, on others below -1."""
    return (functional.relu(1 - on_real).mean() + functional.relu(1 + on_fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How much the adversarial loss counts, so that it pulls on the last layer as hard as the reconstruction does.

    ||grad_last reconstruction|| / (||grad_last adversarial|| + 1e-4), at most 1e4 (arXiv 2012.09841, equation 7, and its code).
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
