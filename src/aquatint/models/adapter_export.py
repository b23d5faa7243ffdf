"""Writing LoRA files, in kohya's names or diffusers'. `adapter_files` says what they look like, and reads them.

A file of diffusers' has no alpha: what is written has the scale multiplied into `lora_B`, so that a factor of 1 is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aquatint.errors import NumericalError, StorageError
from aquatint.models.adapter_files import Names, file_layer, find_places
from aquatint.models.adapter_shapes import NAME, AdapterSpec, added_shapes, spec_layers
from aquatint.models.adapters import Tensors
from aquatint.models.sdxl.shapes import Shape
from aquatint.tensor_file import LazyTensor, TensorFile, write_tensors

HASH_KEY = "modelspec.hash_sha256"
_ENDS: Mapping[Names, Mapping[str, str]] = {
    "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"},
    "diffusers": {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
}


def write_adapter(
    path: Path,
    adapter: Tensors,
    spec: AdapterSpec,
    unet: Mapping[str, Shape],
    *,
    names: Names,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> str:
    """Writes a LoRA file and looks at it; returns the SHA-256 of its data in hex. `unet` has the shapes of the whole model.

    Raises NumericalError when a number does not fit in `dtype`, StorageError when not all that was written is there.
    """
    layers = spec_layers(unet, spec)
    tensors = {name: tensor for layer, shape in layers.items() for name, tensor in _layer(adapter, layer, shape, spec, names, dtype)}
    digest = write_tensors(path, tensors, metadata, data_digest_key=HASH_KEY)
    write_tensors(path, tensors, {**metadata, "sshs_model_hash": digest}, data_digest_key=HASH_KEY)  # A1111's name for the same
    with TensorFile(path) as file:
        if find_places(file, unet).keys() != layers.keys():
            raise StorageError(f"{path} does not read back as it was written", hint="check that the disk is healthy, then export again")
    return digest


def _layer(
    adapter: Tensors, layer: str, weight: Shape, spec: AdapterSpec, names: Names, dtype: torch.dtype
) -> list[tuple[str, Tensor | LazyTensor]]:
    """The tensors of one layer by their names in the file."""
    stem = file_layer(names, layer)
    found: list[tuple[str, Tensor | LazyTensor]] = []
    for part, shape in added_shapes(weight, spec).items():
        name, written = f"{layer}.{NAME}.{part}", _written_shape(names, part, shape, weight)
        factor = spec.scale if names == "diffusers" and part == "up" else 1.0
        found.append((stem + _ENDS[names][part], LazyTensor(dtype, written, partial(_cast, name, adapter[name], dtype, written, factor))))
    if names == "kohya":
        found.append((f"{stem}.alpha", torch.tensor(spec.file_alpha, dtype=torch.float32)))
    return found


def _written_shape(names: Names, part: str, shape: Shape, weight: Shape) -> Shape:
    """Magnitudes are a column in kohya's files, and have the dimensions of a convolution's output in PEFT's."""
    if part != "magnitude":
        return shape
    if names == "kohya":
        return (*shape, *(1 for _ in weight[1:]))
    return shape if len(weight) == 2 else (1, *shape, 1, 1)


def _cast(name: str, value: Tensor | LazyTensor, dtype: torch.dtype, shape: Shape, factor: float) -> Tensor:
    loaded = value.load() if isinstance(value, LazyTensor) else value.detach().cpu()
    tensor = (loaded if factor == 1.0 else loaded.float() * factor).to(dtype).reshape(shape)
    if not tensor.isfinite().all():
        raise NumericalError(
            f"`{name}` does not fit in {str(dtype).removeprefix('torch.')}, or is not a finite number",
            hint='set `export.dtype` to "bfloat16" or "float32"; if that does not help, export an earlier checkpoint',
        )
    return tensor
