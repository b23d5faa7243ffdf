"""What lives where, and in how many bytes."""

from __future__ import annotations

from typing import Literal

from aquatint.config.sections.fields import Section, Share


class MemorySection(Section):
    frozen_format: Literal["own", "int8", "nf4"] = "own"
    """Weights that an adapter is beside: in the UNet's own format, 8 bits (2 GB less) or 4 (3 GB less). Exports have them unharmed."""
    swapped_blocks: Share = 0.0
    """Share of the transformer blocks, the largest first, that wait in main memory for their turn beside an adapter: slower steps."""
    optimizer_state: Literal["model", "cpu"] = "model"
    """Where moments live between steps. `cpu` brings those of one tensor after the other to the GPU: same bits, slower steps."""
