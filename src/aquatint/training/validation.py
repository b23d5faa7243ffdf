"""A loss that can be compared from step to step: the same pictures, noise and timesteps every time.

Each picture is measured at the midpoints of equal timestep strata (and at the terminal step where it is pure noise), with
the mean of its latent and its plain caption. The means are over single samples, in float64, so the batch size does not
matter, and no random state is read or written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from aquatint.data.batch import Batch
from aquatint.data.loader import Entries
from aquatint.data.samples import Samples
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.timesteps import midpoint_timesteps
from aquatint.training.objective import Objective, denoise, squared_errors
from aquatint.training.step import Parts, told

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ValidationSet:
    """The pictures, where their entries are, and the timesteps that each is measured at.

    `texts` are those of `samples`, if none is in the cache because a text encoder is trained.
    """

    entries: Entries
    samples: Samples
    timesteps: tuple[int, ...]
    batch_size: int
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of `n` pictures at `K` timesteps, (n, K): of the UNet's output, and of the picture that it implies."""

    names: tuple[str, ...]
    timesteps: tuple[int, ...]
    output: Table
    x0: Table


def validation_timesteps(number: int, lowest: int, highest: int, *, terminal: bool) -> tuple[int, ...]:
    """Midpoints of `number` strata, and 999 if `terminal`, as far as they are trained; the middle of what is trained if none is."""
    inside = [timestep for timestep in midpoint_timesteps(number, terminal=terminal) if lowest <= timestep <= highest]
    return tuple(inside) or ((lowest + highest) // 2,)


def validation_batches(chosen: ValidationSet) -> Iterator[Batch]:
    """Every picture at every timestep, in batches of equal shape. The noise is keyed by the picture's content and crop."""
    for bucket in chosen.samples.buckets():
        pairs = [(row, k) for row in bucket for k in range(len(chosen.timesteps))]
        for start in range(0, len(pairs), chosen.batch_size):
            part = pairs[start : start + chosen.batch_size]
            batch = chosen.entries.fixed(chosen.samples, [row for row, _ in part], chosen.texts)
            shape = tuple(batch.latents.shape[1:])
            keys = [(chosen.samples.latent_key(row, 0).hex(), k) for row, k in part]
            noise = torch.cat([draw_noise(0, f"validation/{key}", [k], shape) for key, k in keys])
            yield replace(batch, noise=noise, timesteps=torch.tensor([chosen.timesteps[k] for _, k in part]))


@torch.no_grad()
def measure(parts: Parts, chosen: ValidationSet) -> Errors:
    """The errors of all pictures, with the weights as they are."""
    columns: list[tuple[Table, Table]] = [(np.empty(0), np.empty(0))]
    for batch in validation_batches(chosen):
        placed = told(parts, batch.to(parts.device))
        found = denoise(parts.unet, parts.objective, placed, autocast=parts.autocast)
        errors = squared_errors(parts.objective, placed, found).double().cpu().numpy()
        columns.append((errors, errors / _errors_of_x0(parts.objective, batch)))
    output, x0 = (np.concatenate(column).reshape(-1, len(chosen.timesteps)) for column in zip(*columns, strict=True))
    names = tuple(chosen.samples.names[row] for row in range(len(chosen.samples)))
    return Errors(names, chosen.timesteps, output, x0)


def _errors_of_x0(objective: Objective, batch: Batch) -> Table:
    """What divides the error of each sample (B,) to make it one of the picture, at the noise levels of the batch's size."""
    schedule = objective.schedule_at(*batch.latents.shape[2:])
    ratios: Table = replace(objective, schedule=schedule).errors_of_x0.double().cpu().numpy()[batch.timesteps.numpy()]
    return ratios


def figures(objective: Objective, errors: Errors) -> dict[str, float]:
    """The rows' values; none if nothing was measured.

    `val_loss` is the unweighted mean over all samples, `val_loss_weighted` the one with the objective's weights, divided by
    their sum; `val_loss_t062` and so on are the first per timestep, and `val_x0_t062` the same of the error of the picture.
    """
    if not len(errors.output):
        return {}
    values = {"val_loss": float(errors.output.mean())}
    weights = objective.weights.double().cpu().numpy()[list(errors.timesteps)]
    if (counts := weights > 0).any():
        values["val_loss_weighted"] = float(np.average(errors.output.mean(axis=0)[counts], weights=weights[counts]))
    for name, table in ("val_loss", errors.output), ("val_x0", errors.x0):
        values |= {f"{name}_t{timestep:03}": float(mean) for timestep, mean in zip(errors.timesteps, table.mean(axis=0), strict=True)}
    return values


def number_of(chosen: ValidationSet, objective: Objective) -> int:
    """Stands for all that a loss must have in common with another to be compared: pictures, crops, captions, timesteps, prediction."""
    samples = chosen.samples
    firsts = samples.text_keys[samples.text_of.starts[:-1]]
    found = zlib.crc32(f"{objective.prediction} {chosen.timesteps}".encode())
    for keys in samples.latent_keys[:, 0], firsts:
        found = zlib.crc32(np.ascontiguousarray(keys).tobytes(), found)
    return found


def factors(parts: Sequence[Errors]) -> list[tuple[float, int, str]]:
    """Of each picture its error over the mean of all pictures at the same timestep, averaged over the timesteps, the highest first;
    with the number of its part and its name. One that is not finite counts as infinite.
    """
    table = np.concatenate([errors.output for errors in parts])
    finite = np.isfinite(table)
    means = np.where(finite, table, 0.0).sum(axis=0) / np.maximum(1, finite.sum(axis=0))
    ratios = np.where(finite, table / np.where(means > 0, means, 1.0), np.inf).mean(axis=1)
    labels = [(part, name) for part, errors in enumerate(parts) for name in errors.names]
    return sorted(((float(ratio), *label) for ratio, label in zip(ratios, labels, strict=True)), key=lambda one: (-one[0], *one[1:]))


def worst_text(parts: Sequence[Errors], kinds: Sequence[str], *, step: int, number: int) -> str:
    """The pictures with the highest loss for their noise levels, one a line, with the kind of their part."""
    found = factors(parts)
    title = f"step {step}: the loss of a picture over the mean of all {len(found)} that are measured"
    lines = [f"{factor:8.3f}  {kinds[part]:<8}  {name}" for factor, part, name in found[:number]]
    return "\n".join([f"{title}, each noise level on its own", *lines]) + "\n"
