"""What an optimizer's state weighs, from the shapes of the weights alone. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aquatint.optim.library_sizes import LIBRARY_BYTES

STEP_BYTES = 4  # each tensor's step count
FLOAT32_BYTES = 4
BLOCK = 256  # numbers that share a scale in 8-bit state
LEAST_QUANTISED = 4096  # smaller tensors keep float32 state
JOINED_ELEMENTS = 1 << 20  # so many, at most, of small neighbours are stepped together
ALIGNMENT = 64  # bytes; a multiple of every dtype's size


def is_quantised(shape: Sequence[int]) -> bool:
    """Whether `adamw8bit` keeps the moments of such a weight in 8 bits."""
    count = math.prod(shape)
    return count >= LEAST_QUANTISED and count % BLOCK == 0


def preconditioned_dims(shape: Sequence[int], max_precond_dim: int) -> tuple[int | None, int | None]:
    """The sides of a matrix or convolution, taken as (O, I kh kw), that `soap` rotates: a side that is too long is None."""
    sides = shape[0], math.prod(shape[1:])
    left, right = (side if 1 < side <= max_precond_dim else None for side in sides)
    return left, right


def state_bytes(name: str, shapes: Mapping[str, Sequence[int]] | Iterable[Sequence[int]], param_bytes: int, **settings: Any) -> int:
    """What the optimizer's state weighs in memory once it has made two steps.

    `param_bytes` is the size of one element of the weights: 4 for float32, 2 for bfloat16. `settings` are those of the optimizer;
    only some of them matter. `muon` goes by the names of the weights too.
    """
    named = shapes.items() if isinstance(shapes, Mapping) else (("", shape) for shape in shapes)
    if name in LIBRARY_BYTES:
        return sum(LIBRARY_BYTES[name](weight, tuple(shape), param_bytes, settings) for weight, shape in named)
    return sum(STEP_BYTES + _tensor_bytes(name, tuple(shape), param_bytes, settings) for _, shape in named)


def _tensor_bytes(name: str, shape: tuple[int, ...], param_bytes: int, settings: dict[str, Any]) -> int:
    count = math.prod(shape)
    if name == "adafactor":
        return FLOAT32_BYTES * adafactor_elements(shape)
    if name == "adamw8bit":
        each = 1 + FLOAT32_BYTES / BLOCK if is_quantised(shape) else FLOAT32_BYTES
        return int(2 * each * count)
    moments = 3 if settings.get("rounding") == "kahan" and param_bytes < FLOAT32_BYTES else 2
    squares = 0
    if name == "soap" and len(shape) > 1:
        squares = sum(2 * side**2 for side in preconditioned_dims(shape, settings["max_precond_dim"]) if side is not None)
    return moments * param_bytes * count + FLOAT32_BYTES * squares


def adafactor_elements(shape: Sequence[int]) -> int:
    """Rows plus columns of a matrix or convolution, or all elements of a vector."""
    return math.prod(shape) if len(shape) < 2 else shape[0] + math.prod(shape[1:])


def packed_bytes(sizes: Iterable[int]) -> int:
    """What tensors of so many bytes take one behind the other, each at a multiple of `ALIGNMENT`."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
