"""The Inception network that FID is defined with (arXiv 1706.08500), from a safetensors file with the names of pytorch-fid.

It is the network of December 2015, which differs from torchvision's in three ways (github.com/mseitzer/pytorch-fid): averages leave
out the padding, the last block takes maxima instead, and there are 1008 classes, by which a file is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, max_pool2d, relu

from aquatint.errors import ModelFileError
from aquatint.tensor_file import TensorFile

SIDE_PX = 299
BATCH_NORM_EPS = 1e-3
NUM_CLASSES = 1008
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BRANCHES = {  # of the blocks of each kind
    "5": ("branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", "branch_pool"),
    "6a": ("branch3x3", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    "6": (
        "branch1x1", "branch7x7_1", "branch7x7_2", "branch7x7_3", "branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3",
        "branch7x7dbl_4", "branch7x7dbl_5", "branch_pool",
    ),
    "7a": ("branch3x3_1", "branch3x3_2", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
    "7": (
        "branch1x1", "branch3x3_1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a",
        "branch3x3dbl_3b", "branch_pool",
    ),
}  # fmt: skip
_BLOCKS = {"5b": "5", "5c": "5", "5d": "5", "6a": "6a", "6b": "6", "6c": "6", "6d": "6", "6e": "6", "7a": "7a", "7b": "7", "7c": "7"}
LAYERS = (*_STEM, *(f"Mixed_{block}.{branch}" for block, kind in _BLOCKS.items() for branch in _BRANCHES[kind]))
_PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def load_inception(path: Path) -> Inception:
    """Raises ModelFileError for a file that is not this network."""
    with TensorFile(path) as file:
        missing = [f"{layer}.{part}" for layer in LAYERS for part in _PARTS if f"{layer}.{part}" not in file.tensors]
        head = file.tensors.get("fc.weight")
        if missing or head is None or head.shape[0] != NUM_CLASSES:
            what = f"it has no `{missing[0]}`" if missing else f"its head is not one of {NUM_CLASSES} classes, as torchvision's is not"
            raise ModelFileError(f"{path} is not the Inception network of FID: {what}", hint="docs/evaluation.md says how to make the file")
        return Inception({layer: [file.read(f"{layer}.{part}").float() for part in _PARTS] for layer in LAYERS})


class Inception:
    """Pictures to features: the network up to its last pooling. `layers` has filters and batch norm of each layer."""

    def __init__(self, layers: Mapping[str, list[Tensor]]) -> None:
        self._layers = {name: _folded(*parts) for name, parts in layers.items()}

    def to(self, device: torch.device) -> Inception:
        """Itself, moved to a device."""
        self._layers = {name: (weight.to(device), bias.to(device)) for name, (weight, bias) in self._layers.items()}
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, 299, 299) in 0..255 -> features (B, 2048)."""
        x = self._conv((pictures - 128) / 128, "Conv2d_1a_3x3", stride=2, pad=False)
        x = self._conv(self._conv(x, "Conv2d_2a_3x3", pad=False), "Conv2d_2b_3x3")
        x = self._conv(max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = max_pool2d(self._conv(x, "Conv2d_4a_3x3", pad=False), 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._wide(x, block)
        x = self._reduce(x, "Mixed_6a", ("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._stretched(x, block)
        seven = tuple(f"branch7x7x3_{number}" for number in range(1, 5))
        x = self._reduce(x, "Mixed_7a", ("branch3x3_1", "branch3x3_2"), seven)
        x = self._forked(x, "Mixed_7b", _average(x))
        return self._forked(x, "Mixed_7c", max_pool2d(x, 3, 1, 1)).mean(dim=(2, 3))

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, pad: bool = True) -> Tensor:
        weight, bias = self._layers[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if pad else 0
        return relu(conv2d(x, weight, bias, stride, padding))

    def _chain(self, x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = self._conv(x, f"{block}.{name}")
        return x

    def _wide(self, x: Tensor, block: str) -> Tensor:
        five, three = ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        parts = [self._chain(x, block, "branch1x1"), self._chain(x, block, *five), self._chain(x, block, *three)]
        return torch.cat([*parts, self._chain(_average(x), block, "branch_pool")], dim=1)

    def _stretched(self, x: Tensor, block: str) -> Tensor:
        seven = [f"branch7x7_{number}" for number in range(1, 4)]
        double = [f"branch7x7dbl_{number}" for number in range(1, 6)]
        parts = [self._chain(x, block, "branch1x1"), self._chain(x, block, *seven), self._chain(x, block, *double)]
        return torch.cat([*parts, self._chain(_average(x), block, "branch_pool")], dim=1)

    def _forked(self, x: Tensor, block: str, pooled: Tensor) -> Tensor:
        three = self._chain(x, block, "branch3x3_1")
        double = self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        forks = [self._chain(three, block, f"branch3x3_2{side}") for side in "ab"]
        forks += [self._chain(double, block, f"branch3x3dbl_3{side}") for side in "ab"]
        return torch.cat([self._chain(x, block, "branch1x1"), *forks, self._chain(pooled, block, "branch_pool")], dim=1)

    def _reduce(self, x: Tensor, block: str, *branches: tuple[str, ...]) -> Tensor:
        """Halves the picture: the last layer of each branch steps over every other place."""
        ends = [self._conv(self._chain(x, block, *names[:-1]), f"{block}.{names[-1]}", stride=2, pad=False) for names in branches]
        return torch.cat([*ends, max_pool2d(x, 3, 2)], dim=1)


def shrink(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255 -> (B, 3, 299, 299), bicubic, antialiased and not rounded: as clean-fid does it (arXiv 2104.11222)."""
    size = (SIDE_PX, SIDE_PX)
    return interpolate(pictures.float(), size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


def _average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _folded(filters: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Filters and bias of a convolution with its batch norm (eval) worked in."""
    factor = scale * (variance + BATCH_NORM_EPS).rsqrt()
    return filters * factor[:, None, None, None], shift - mean * factor
