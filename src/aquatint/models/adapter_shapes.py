"""Which layers an adapter goes to, and the names and shapes of what it adds to them: no torch, so that planning can count it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from aquatint.models.sdxl.shapes import Shape
from aquatint.optim.groups import fits

Kind = Literal["lora", "dora"]
Targets = Literal["attention", "transformer", "all"]
TARGETS: tuple[Targets, ...] = ("attention", "transformer", "all")

NAME = "lora"  # of the part that is added to a layer, and so in the names of what is trained: `conv1.lora.down`
_TEXT_LAYERS = r"\.(self_attn|mlp)\."
_PATTERNS: Mapping[Targets, str] = {
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$|\.self_attn\.(q|k|v|out)_proj$",
    "transformer": rf"\.attentions\.\d+\.|{_TEXT_LAYERS}",
    "all": rf"\.(attentions|resnets|downsamplers|upsamplers)\.\d+\.|{_TEXT_LAYERS}",
}


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained beside a frozen UNet: `scale * up @ down` for each layer, and with DoRA a magnitude for each output."""

    kind: Kind
    rank: int
    alpha: float
    targets: Targets
    rslora: bool = False
    groups: tuple[tuple[str, bool], ...] = ()
    """Patterns of names, and whether what they fit has no adapter after all; the first that fits a layer counts."""

    @property
    def scale(self) -> float:
        """alpha / r (arXiv 2106.09685, section 4.1), or alpha / sqrt(r) (arXiv 2312.03732, theorem 3.2)."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def file_alpha(self) -> float:
        """The alpha that gives the same scale to a program that divides it by the rank, as all of them do."""
        return self.alpha * sqrt(self.rank) if self.rslora else self.alpha


def layer_shapes(unet: Mapping[str, Shape]) -> dict[str, Shape]:
    """Layer -> shape of its weight, for all linear layers and convolutions of a UNet: norms have no matrix."""
    return {name.removesuffix(".weight"): shape for name, shape in unet.items() if name.endswith(".weight") and len(shape) > 1}


def target_layers(unet: Mapping[str, Shape], targets: Targets) -> dict[str, Shape]:
    """The layers that an adapter goes to, with the shapes of their weights; `unet` has those of all its tensors.

    There may be those of text encoders too, whose names have the encoder before them.
    `attention`: queries, keys, values and outputs. `transformer`: every linear layer of the transformers, as sd-scripts does it.
    `all`: the residual blocks' and the resamplers' layers too, as LoCon does it.
    """
    pattern = re.compile(_PATTERNS[targets])
    return {layer: shape for layer, shape in layer_shapes(unet).items() if pattern.search(layer)}


def spec_layers(unet: Mapping[str, Shape], spec: AdapterSpec) -> dict[str, Shape]:
    """`target_layers` without those that are to have no adapter."""

    def is_left_out(layer: str) -> bool:
        return next((left_out for pattern, left_out in spec.groups if fits(f"{layer}.weight", pattern)), False)

    return {layer: shape for layer, shape in target_layers(unet, spec.targets).items() if not is_left_out(layer)}


def added_shapes(shape: Shape, spec: AdapterSpec) -> dict[str, Shape]:
    """What is added to a layer whose weight has this shape. A convolution's kernel is in `down`; its `up` is 1x1."""
    outputs, inputs, *kernel = shape
    shapes: dict[str, Shape] = {"down": (spec.rank, inputs, *kernel), "up": (outputs, spec.rank, *(1 for _ in kernel))}
    return shapes | ({"magnitude": (outputs,)} if spec.kind == "dora" else {})


def adapter_shapes(unet: Mapping[str, Shape], spec: AdapterSpec) -> dict[str, Shape]:
    """Name -> shape of everything that is trained."""
    return {
        f"{layer}.{NAME}.{part}": added
        for layer, shape in spec_layers(unet, spec).items()
        for part, added in added_shapes(shape, spec).items()
    }
