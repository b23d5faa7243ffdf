"""The finished model, or the adapter that was trained beside it, as files that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from aquatint.config.sections.looks import ExportSection
from aquatint.models.adapter_export import write_adapter
from aquatint.models.adapter_metadata import TagFrequency, adapter_metadata
from aquatint.models.adapter_shapes import AdapterSpec
from aquatint.models.sdxl.export import export_diffusers, export_single_file, modelspec_metadata
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import Shape
from aquatint.storage import remove_folder
from aquatint.tensor_file import LazyTensor


def export_model(
    base: BaseModel,
    weights: Mapping[str, torch.Tensor | LazyTensor],
    target: Path,
    section: ExportSection,
    name: str,
    process: Process,
    resolution: int,
) -> tuple[Path, ...]:
    """Writes what the section asks for: `target.safetensors`, and the folder `target`. Returns their paths."""
    dtype = getattr(torch, section.dtype)
    written = []
    if section.single_file:
        path = target.with_name(target.name + ".safetensors")
        metadata = _modelspec(section, name, process, resolution)
        export_single_file(path, base, weights, dtype=dtype, metadata=metadata, process=process)
        written.append(path)
    if section.diffusers_folder:
        if (target / "model_index.json").exists():
            remove_folder(target)  # an export of this very run: its weights are in the checkpoint
        export_diffusers(target, base, weights, dtype=dtype, process=process)
        written.append(target)
    return tuple(written)


def export_adapter(
    base: BaseModel,
    weights: Mapping[str, torch.Tensor | LazyTensor],
    spec: AdapterSpec,
    shapes: Mapping[str, Shape],
    target: Path,
    section: ExportSection,
    name: str,
    process: Process,
    resolution: int,
    tag_frequency: TagFrequency,
) -> tuple[Path, ...]:
    """Writes an adapter in each spelling that the section asks for: `target-lora.safetensors`, `target-lora-diffusers.safetensors`.

    `shapes` are those of all weights that adapters can be beside.
    """
    written = []
    for names in section.lora_names:
        end = "-lora" if names == "kohya" else "-lora-diffusers"
        path = target.with_name(f"{target.name}{end}.safetensors")
        metadata = adapter_metadata(
            spec, _modelspec(section, name, process, resolution), names=names, output_name=path.stem, base_name=base.path.name,
            resolution=resolution, process=process, tag_frequency=tag_frequency,
        )  # fmt: skip
        dtype = getattr(torch, section.dtype)
        write_adapter(path, weights, spec, shapes, names=names, dtype=dtype, metadata=metadata)
        written.append(path)
    return tuple(written)


def _modelspec(section: ExportSection, name: str, process: Process, resolution: int) -> dict[str, str]:
    return modelspec_metadata(
        title=section.title or name, author=section.author, license=section.license,
        date=datetime.now(UTC).isoformat(timespec="seconds"), resolution=f"{resolution}x{resolution}", process=process,
    )  # fmt: skip
