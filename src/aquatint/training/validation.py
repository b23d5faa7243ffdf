"""A loss that can be compared from step to step: the same pictures, noise and timesteps every time.

Each held-out picture is measured at the midpoints of equal timestep strata (and at the terminal step where it is pure
noise), with the mean of its latent and its plain caption. The sums are over single samples, so the batch size does not
matter, and no random state is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from aquatint.data.batch import Batch
from aquatint.data.loader import Entries
from aquatint.data.samples import Samples
from aquatint.diffusion.noise import draw_noise
from aquatint.training.step import Parts, prediction_error


@dataclass(frozen=True)
class ValidationSet:
    """The pictures, where their entries are, and the timesteps that each is measured at."""

    entries: Entries
    samples: Samples
    timesteps: tuple[int, ...]
    batch_size: int


def validation_batches(chosen: ValidationSet) -> Iterator[Batch]:
    """Every picture at every timestep, in batches of equal shape. The noise is keyed by the picture's content and crop."""
    for bucket in chosen.samples.buckets():
        pairs = [(row, k) for row in bucket for k in range(len(chosen.timesteps))]
        for start in range(0, len(pairs), chosen.batch_size):
            part = pairs[start : start + chosen.batch_size]
            batch = chosen.entries.fixed(chosen.samples, [row for row, _ in part])
            shape = tuple(batch.latents.shape[1:])
            keys = [(chosen.samples.latent_key(row, 0).hex(), k) for row, k in part]
            noise = torch.cat([draw_noise(0, f"validation/{key}", [k], shape) for key, k in keys])
            yield replace(batch, noise=noise, timesteps=torch.tensor([chosen.timesteps[k] for _, k in part]))


@torch.no_grad()
def measure(parts: Parts, batches: Iterator[Batch] | Sequence[Batch]) -> dict[str, float]:
    """`val_loss`: the unweighted mean squared error over all samples; `val_loss_t062` and so on: the same per timestep."""
    sums: dict[int, tuple[float, int]] = {}
    for batch in batches:
        batch = batch.to(parts.device)
        for timestep, error in zip(batch.timesteps.tolist(), prediction_error(parts, batch).double().tolist(), strict=True):
            total, count = sums.get(timestep, (0.0, 0))
            sums[timestep] = (total + error, count + 1)
    if not sums:
        return {}
    mean = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    return {"val_loss": mean} | {f"val_loss_t{timestep:03}": total / count for timestep, (total, count) in sorted(sums.items())}
