"""Models small enough to be written in milliseconds, and files of any size that take no room on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

from aquatint.demo.model import tiny_spec
from aquatint.models.sdxl.keys import original_shapes
from aquatint.models.sdxl.load import SPEC_KEY
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.shapes import Shape


def small_spec() -> ModelSpec:
    """The tiny model with narrower networks and a hundred words: 1 MB instead of 50."""
    spec = tiny_spec()
    return replace(
        spec,
        unet={**spec.unet, "block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2], "transformer_layers_per_block": [1, 1, 1]},
        vae={**spec.vae, "block_out_channels": [8, 8, 16, 16]},
        text_encoder={**spec.text_encoder, "vocab_size": 100},
        text_encoder_2={**spec.text_encoder_2, "vocab_size": 100},
    )


def spec_metadata(spec: ModelSpec) -> dict[str, str]:
    return {SPEC_KEY: json.dumps(asdict(spec))}


def write_header(path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of float16 zeros, as a header and a hole."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": dict(metadata or {}), **entries}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def write_small(path: Path, *, without: tuple[str, ...] = (), **others: Shape) -> Path:
    """The small model's header. Tensors whose names begin with one of `without` are left out; `others` are added."""
    spec = small_spec()
    shapes = {name: shape for name, shape in original_shapes(spec).items() if not name.startswith(without)}
    return write_header(path, {**shapes, **others}, spec_metadata(spec))
