"""How frozen linear layers can be kept, and what that weighs: no torch, so that planning can count it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

from aquatint.models.adapter_shapes import target_layers
from aquatint.models.sdxl.shapes import Shape

Format = Literal["own", "int8", "nf4"]
NF4_BLOCK = 64  # weights that share a scale (arXiv 2305.14314, section 3)
NF4_PAIRS = 256  # a byte holds two weights
NF4_BYTES_MADE = 6  # for each weight while it is made, beside itself: its value in float32, and two for its byte's place in the table
FLOAT32_BYTES = 4
MARK = ".transformer_blocks."


def compact_layers(unet: Mapping[str, Shape], kept: Format) -> dict[str, Shape]:
    """The layers that can be kept so, with the shapes of their weights: the transformers' linear ones, 86 % of SDXL's UNet."""
    linear = {layer: shape for layer, shape in target_layers(unet, "transformer").items() if len(shape) == 2}
    return {layer: shape for layer, shape in linear.items() if kept != "nf4" or prod(shape) % NF4_BLOCK == 0}


def part_bytes(shape: Shape, kept: Format, dtype_bytes: int) -> tuple[int, ...]:
    """The bytes of each tensor that a weight (O, I) is kept as. `dtype_bytes` is the size of a number of the UNet."""
    count = prod(shape)
    if kept == "own":
        return (count * dtype_bytes,)
    if kept == "int8":
        return count, shape[0] * FLOAT32_BYTES
    return count // 2, count // NF4_BLOCK * FLOAT32_BYTES, NF4_PAIRS * 2 * FLOAT32_BYTES


def transformer_blocks(layers: Mapping[str, Shape]) -> dict[str, tuple[str, ...]]:
    """Transformer block -> its layers, in the order of `layers`."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        before, mark, inside = layer.partition(MARK)
        if mark:
            found.setdefault(f"{before}{MARK}{inside.split('.')[0]}", []).append(layer)
    return {block: tuple(members) for block, members in found.items()}


def largest_blocks(layers: Mapping[str, Shape], count: int) -> dict[str, tuple[str, ...]]:
    """So many of the transformer blocks, those with the most weights; of equals, the first."""
    blocks = transformer_blocks(layers)
    sizes = {block: sum(prod(layers[layer]) for layer in members) for block, members in blocks.items()}
    return {block: blocks[block] for block in sorted(blocks, key=lambda block: -sizes[block])[:count]}
