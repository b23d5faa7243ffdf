"""The training loss told apart: by noise level, by size of the picture, by source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from aquatint.diffusion.schedule import NUM_TIMESTEPS
from aquatint.models.sdxl.generate import PX_PER_LATENT
from aquatint.training.step import StepReport

NUM_BANDS = 4
MAX_PARTS = 16  # more sizes or sources than this would only make rows long


@dataclass(frozen=True)
class Breakdown:
    """What is told apart beside bands of timesteps."""

    by_size: bool
    by_source: bool

    def of(self, report: StepReport) -> Iterator[tuple[str, float]]:
        """The unweighted loss of each sample, once for each part that it belongs to; one that is not finite is left out."""
        for loss, timestep, source, (height, width) in zip(report.losses, report.timesteps, report.sources, report.sizes_hw, strict=True):
            if math.isfinite(loss):
                yield band(timestep), loss
                if self.by_size:
                    yield f"{width * PX_PER_LATENT}x{height * PX_PER_LATENT}", loss
                if self.by_source:
                    yield f"source_{source}", loss


def band(timestep: int) -> str:
    """`t250_499` for a timestep of the second of four bands."""
    length = NUM_TIMESTEPS // NUM_BANDS
    start = timestep // length * length
    return f"t{start:03}_{start + length - 1:03}"


def choose_breakdown(num_sizes: int, num_sources: int) -> Breakdown:
    """Sizes and sources are told apart where there are several, and not too many."""
    return Breakdown(by_size=1 < num_sizes <= MAX_PARTS, by_source=1 < num_sources <= MAX_PARTS)
