"""Frozen weights in fewer bytes, in bf16 or in main memory, and the optimizer's state there: which they are, and what the device holds."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from aquatint.config.memory_rules import keeps_compactly
from aquatint.config.schema import Config
from aquatint.models.frozen_shapes import NF4_BYTES_MADE, compact_layers, largest_blocks, part_bytes, transformer_blocks
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.shapes import Shape
from aquatint.optim.sizes import JOINED_ELEMENTS, packed_bytes, state_bytes
from aquatint.planning.groups import frozen_names
from aquatint.planning.trained import num_frozen, trained_shapes, unet_dtype, weight_dtype, weight_shapes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
JOINING = ("adamw_bf16", "adamw8bit", "adafactor", "soap")  # optimizers that step small neighbours together
MOMENTS_BYTES = 8  # of one element, in float32


def compact_layers_of(config: Config, spec: ModelSpec) -> dict[str, Shape]:
    """The frozen layers that are kept in the format of `memory.frozen_format`, or in main memory, with the shapes of their weights."""
    if not keeps_compactly(config):
        return {}
    found = compact_layers(spec.shapes("unet"), config.memory.frozen_format)
    if config.memory.frozen_format != "own":
        return found
    swapped = {layer for members in _largest(config, found).values() for layer in members}
    return {layer: shape for layer, shape in found.items() if layer in swapped}


def swapped_blocks(config: Config, spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The transformer blocks whose weights wait in main memory, with their layers."""
    if config.memory.swapped_blocks == 0:
        return {}
    return _largest(config, compact_layers(spec.shapes("unet"), config.memory.frozen_format))


def _largest(config: Config, layers: Mapping[str, Shape]) -> dict[str, tuple[str, ...]]:
    return largest_blocks(layers, ceil(config.memory.swapped_blocks * len(transformer_blocks(layers))))


def frozen_of_groups(config: Config, spec: ModelSpec) -> frozenset[str]:
    """Those weights, of networks that are trained themselves, that groups freeze."""
    return frozen_names(config, weight_shapes(config, spec)) if config.adapter.kind == "none" else frozenset()


def half_frozen(config: Config, spec: ModelSpec) -> frozenset[str]:
    """Those of them in the UNet that are kept in bf16, as which autocast takes them anyway: matrices and convolutions."""
    if config.training.precision != "bf16_mixed":
        return frozenset()
    shapes = spec.shapes("unet")
    return frozenset(name for name in frozen_of_groups(config, spec) if len(shapes.get(name, ())) > 1)


def frozen_bytes(config: Config, spec: ModelSpec) -> int:
    """The frozen weights of the UNet that are on the device all the time."""
    each, layers, shapes = DTYPE_BYTES[unet_dtype(config)], compact_layers_of(config, spec), spec.shapes("unet")
    halved = sum(prod(shapes[name]) for name in half_frozen(config, spec))
    swapped = {layer for members in swapped_blocks(config, spec).values() for layer in members}
    compact = sum(sum(part_bytes(shape, config.memory.frozen_format, each)) for layer, shape in layers.items() if layer not in swapped)
    return (num_frozen(config, spec) - sum(map(prod, layers.values()))) * each - halved * (each - 2) + compact


def swapped_bytes(config: Config, spec: ModelSpec) -> tuple[int, ...]:
    """What each block that waits in main memory takes there, the largest first."""
    layers, each = compact_layers_of(config, spec), DTYPE_BYTES[unet_dtype(config)]

    def packed(members: tuple[str, ...]) -> int:
        return packed_bytes(size for layer in members for size in part_bytes(layers[layer], config.memory.frozen_format, each))

    return tuple(sorted((packed(members) for members in swapped_blocks(config, spec).values()), reverse=True))


def swap_room_bytes(config: Config, spec: ModelSpec) -> int:
    """The room on the device for the block in use and the next one."""
    blocks = swapped_bytes(config, spec)
    return blocks[0] * min(2, len(blocks)) if blocks else 0


def made_bytes(config: Config, spec: ModelSpec) -> int:
    """The most that is there for a moment when a weight is made from few bits: itself, and for nf4 float32 numbers and whole codes."""
    kept, each = config.memory.frozen_format, DTYPE_BYTES[unet_dtype(config)]
    largest = max(map(prod, compact_layers_of(config, spec).values()), default=0)
    return 0 if kept == "own" else largest * (each + (NF4_BYTES_MADE if kept == "nf4" else 0))


def optimizer_room_bytes(config: Config, spec: ModelSpec) -> int:
    """The room on the device for the state of what is stepped and of what comes next, if the rest is in main memory: at most so much.

    Some optimizers step small neighbours together, and have their states there together.
    """
    name, settings, each = config.optimizer.name, config.optimizer.model_dump(exclude={"name"}), DTYPE_BYTES[weight_dtype(config)]
    sizes = [state_bytes(name, {weight: shape}, each, **settings) for weight, shape in trained_shapes(config, spec).items()]
    together = min(sum(sizes), MOMENTS_BYTES * JOINED_ELEMENTS) if name in JOINING else 0
    return 2 * max(*sizes, together)
