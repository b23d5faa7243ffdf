"""The learning rate over time."""

from __future__ import annotations

import math
from typing import Literal

Curve = Literal["constant", "cosine", "linear", "inverse_sqrt"]


def learning_rate_factor(
    step: int, *, schedule: Curve, warmup_steps: int, total_steps: int, end_factor: float, reference_steps: int = 1
) -> float:
    """Share of the peak learning rate, with `step` optimizer steps done: step 0 is the first one.

    It rises on a line from 0 to 1 over `warmup_steps`. Then it stays, or falls to `end_factor` at `total_steps`, on a line or on
    half a cosine wave (arXiv 1608.03983, equation 5), and stays there. inverse_sqrt knows no end: sqrt(reference_steps / step) once that
    is below 1 (arXiv 2312.02696, equation 67).
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return min(1.0, math.sqrt(reference_steps / max(step, 1)))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return end_factor + (1 - end_factor) * remaining
