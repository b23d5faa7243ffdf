"""How different two pictures look: LPIPS, the distance between their features in VGG16 (arXiv 1801.03924, section 3.2).

VGG16 (arXiv 1409.1556, table 1, D) is thirteen 3x3 convolutions; its weights are the user's own file, under torchvision's
names. With the five `lin` heads of LPIPS in the same file, channels count as much as people's judgement says; without
them, all alike, and the distance is larger.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from aquatint.errors import ModelFileError
from aquatint.tensor_file import TensorFile, TensorInfo

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # numbers of the convolutions; a stage's last one is compared
WIDTHS = (64, 128, 256, 512, 512)
SHIFT = (-0.030, -0.088, -0.188)  # of red, green and blue in -1 … 1: ImageNet's mean and deviation, as LPIPS has them
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
MIN_SIDE_PX = 16  # four times halved
_HEAD = re.compile(r"lins?\.?([0-4])\.model\.1\.weight")
_HINT = "make it as docs/vae.md says, and name it in `vae_training.perceptual_model`"


@dataclass(frozen=True)
class PerceptualWeights:
    """Weight and bias of each of the thirteen convolutions, and what each stage's channels count for, (C,); all float32."""

    convolutions: dict[int, tuple[Tensor, Tensor]]
    heads: tuple[Tensor, ...]


def load_perceptual(path: Path, device: torch.device | str = "cpu") -> PerceptualWeights:
    """Raises ModelFileError for a file that does not hold VGG16's convolutions, or only some of the heads."""
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}", hint=_HINT)
    with TensorFile(path) as file:
        _check(path, file.tensors)

        def read(name: str) -> Tensor:
            return file.read(name).to(device, torch.float32)

        convolutions = {
            number: (read(f"features.{number}.weight"), read(f"features.{number}.bias")) for stage in STAGES for number in stage
        }
        names = _head_names(file.tensors)
        ones = tuple(torch.ones(width, device=device) for width in WIDTHS)
        heads = tuple(read(names[number]).flatten() for number in range(len(STAGES))) if names else ones
    return PerceptualWeights(convolutions, heads)


def perceptual_distance(weights: PerceptualWeights, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS of pictures (B, 3, H, W) in [-1, 1], from 16 pixels a side: (B,), 0 for equal ones.

    Each stage's features are brought to length 1 across channels; their squared difference is weighed by channel, summed,
    and averaged over places; stages are summed (equation 1).
    """
    total = torch.zeros(len(first), device=first.device)
    for one, other, head in zip(_features(weights, first), _features(weights, second), weights.heads, strict=True):
        difference = (_unit(one) - _unit(other)).square()
        total = total + (difference * head.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
    return total


def _features(weights: PerceptualWeights, images: Tensor) -> list[Tensor]:
    """What the last convolution of each stage gives, after its ReLU."""
    shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    found: list[Tensor] = []
    values = (images.float() - shift) / scale
    for stage in STAGES:
        if found:
            values = functional.max_pool2d(values, 2)
        for number in stage:
            values = functional.relu(functional.conv2d(values, *weights.convolutions[number], padding=1))
        found.append(values)
    return found


def _unit(features: Tensor) -> Tensor:
    """Length 1 across channels. `vector_norm` has gradient 0 where there is no feature at all; the root of a sum has none."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def _head_names(tensors: dict[str, TensorInfo]) -> dict[int, str]:
    """Stage -> name of its head; LPIPS writes `lin0.model.1.weight`, and some of its children `lins.0.model.1.weight`."""
    return {int(match[1]): name for name in tensors if (match := _HEAD.fullmatch(name))}


def _check(path: Path, tensors: dict[str, TensorInfo]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    before = 3
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        for number in stage:
            expected |= {f"features.{number}.weight": (width, before, 3, 3), f"features.{number}.bias": (width,)}
            before = width
    if names := _head_names(tensors):
        expected |= {names.get(stage, f"lin{stage}.model.1.weight"): (1, width, 1, 1) for stage, width in enumerate(WIDTHS)}
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelFileError(f"{path} is not VGG16 as torchvision names it: it has no `{name}`", hint=_HINT)
        if tensors[name].shape != shape:
            raise ModelFileError(f"{path} is not VGG16: `{name}` is {list(tensors[name].shape)} instead of {list(shape)}", hint=_HINT)
