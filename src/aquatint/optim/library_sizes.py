"""What the optimizers of other libraries keep of each weight, from its shape. Needs neither torch nor the libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from types import MappingProxyType
from typing import Any

Shape = Sequence[int]
STEP_BYTES = SCALE_BYTES = FLOAT32_BYTES = 4
LEAST_QUANTISED = 4096  # smaller tensors keep their state in float32
Formula = Callable[[str, Shape, int, Mapping[str, Any]], int]
"""Name and shape of a weight, bytes of one of its elements, and the settings -> bytes of its state."""


def is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether Muon takes a weight: a matrix between two layers. Embeddings of time, size and words are not."""
    return len(shape) == 2 and "embedding" not in name


def _copies(number: int) -> Formula:
    return lambda name, shape, width, settings: number * prod(shape) * width


def _muon(name: str, shape: Shape, width: int, settings: Mapping[str, Any]) -> int:
    return prod(shape) * width if is_hidden_matrix(name, shape) else 2 * prod(shape) * width + STEP_BYTES


def _factors(shape: Shape) -> int:
    """Row and column sums over the last two sides, as torch and CAME take them: for a kernel, those of its 3 x 3."""
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def _torch_adafactor(name: str, shape: Shape, width: int, settings: Mapping[str, Any]) -> int:
    return STEP_BYTES + width * (_factors(shape) if len(shape) > 1 else prod(shape))


def _came(name: str, shape: Shape, width: int, settings: Mapping[str, Any]) -> int:
    count = prod(shape)
    return width * (count + (2 * _factors(shape) if len(shape) > 1 else count) + 1)


def _prodigy(name: str, shape: Shape, width: int, settings: Mapping[str, Any]) -> int:
    looked_at: int = ceil(prod(shape) / settings["slice_p"])
    return 2 * width * (prod(shape) + looked_at)


def _quantised(moments: int, bits: int, block: int, *, map_bytes: int = 0, step: int = 0, whole_blocks: bool = False) -> Formula:
    """Codes and a scale for each block; small tensors as they are, and with `whole_blocks` those too that do not fill their last one."""

    def formula(name: str, shape: Shape, width: int, settings: Mapping[str, Any]) -> int:
        count = prod(shape)
        if count < LEAST_QUANTISED or (whole_blocks and count % block):
            return step + moments * FLOAT32_BYTES * count
        return step + moments * (count * bits // 8 + SCALE_BYTES * ceil(count / block) + map_bytes)

    return formula


LIBRARY_BYTES: Mapping[str, Formula] = MappingProxyType(
    {
        "muon": _muon,
        "torch_adafactor": _torch_adafactor,
        "torchao_adamw8bit": _quantised(2, 8, 256, map_bytes=1024, step=STEP_BYTES, whole_blocks=True),
        "torchao_adamw4bit": _quantised(2, 4, 128, map_bytes=64, step=STEP_BYTES, whole_blocks=True),
        "torchao_adamw_fp8": _quantised(2, 8, 256, step=STEP_BYTES, whole_blocks=True),
        "bnb_adamw8bit": _quantised(2, 8, 256),
        "bnb_paged_adamw8bit": _quantised(2, 8, 256),
        "bnb_lion8bit": _quantised(1, 8, 256),
        "prodigy": _prodigy,
        "schedule_free": _copies(2),
        "lion": _copies(1),
        "came": _came,
    }
)
