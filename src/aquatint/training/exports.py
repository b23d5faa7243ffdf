"""The finished model as files that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from aquatint.config.schema import ExportSection
from aquatint.models.sdxl.export import export_diffusers, export_single_file, modelspec_metadata
from aquatint.models.sdxl.load import BaseModel
from aquatint.storage import remove_folder
from aquatint.tensor_file import LazyTensor
from aquatint.training.step import Objective


def export_model(
    base: BaseModel,
    weights: Mapping[str, torch.Tensor | LazyTensor],
    target: Path,
    section: ExportSection,
    name: str,
    objective: Objective,
    resolution: int,
) -> tuple[Path, ...]:
    """Writes what the section asks for: `target.safetensors`, and the folder `target`. Returns their paths."""
    dtype = getattr(torch, section.dtype)
    what = {"prediction": objective.prediction, "zero_terminal_snr": objective.schedule.zero_terminal_snr}
    written = []
    if section.single_file:
        path = target.with_name(target.name + ".safetensors")
        metadata = modelspec_metadata(
            title=section.title or name, author=section.author, license=section.license,
            date=datetime.now(UTC).isoformat(timespec="seconds"), resolution=f"{resolution}x{resolution}", **what,
        )  # fmt: skip
        export_single_file(path, base, weights, dtype=dtype, metadata=metadata, **what)
        written.append(path)
    if section.diffusers_folder:
        if (target / "model_index.json").exists():
            remove_folder(target)  # an export of this very run: its weights are in the checkpoint
        export_diffusers(target, base, weights, dtype=dtype, **what)
        written.append(target)
    return tuple(written)
