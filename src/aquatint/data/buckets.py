"""Aspect-ratio buckets: the shapes in which pictures are trained, and which picture goes where.

A picture of size s costs in a bucket b

    |ln(aspect_b / aspect_s)| + area_weight * ln(A / area_b) + upscale_weight * max(0, ln(scale))

with scale the factor by which it must be resized to cover the bucket, and A the largest area: cropping, a bucket
smaller than needed, and enlarging each have their price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aquatint.errors import UsageError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MIN_AREA_SHARE = 0.85  # of resolution squared; smaller buckets would waste the memory that the largest one needs
_ROWS_AT_ONCE = 1 << 11  # a cost table that stays in the cache of a core: measured, a million pictures take a quarter of the time


@dataclass(frozen=True)
class BucketPlan:
    """`shapes` (m, 2) are the buckets in use as (height, width), sorted; `assignment` (n,) is each picture's bucket."""

    shapes: Ints
    assignment: Ints


def candidates(*, resolution: int, step: int, min_side: int, max_side: int, max_aspect: float) -> Ints:
    """All allowed shapes (m, 2) as (height, width) in pixels, sorted.

    Sides are multiples of `step` in [min_side, max_side], areas in [0.85, 1] of resolution squared, and the long side
    is at most `max_aspect` times the short one. Raises UsageError if no shape is allowed.
    """
    sides = np.arange(-(-min_side // step) * step, max_side + 1, step, dtype=np.int64)
    height, width = (grid.reshape(-1) for grid in np.meshgrid(sides, sides, indexing="ij"))
    area, full = height * width, resolution * resolution
    allowed = (area <= full) & (area >= MIN_AREA_SHARE * full)
    allowed &= np.maximum(height, width) <= max_aspect * np.minimum(height, width)
    if not allowed.any():
        raise UsageError(
            f"no bucket has sides of {min_side} to {max_side} pixels in steps of {step} and about {resolution} x {resolution} pixels",
            hint="set buckets.min_side below and buckets.max_side above buckets.resolution, and resolution to a multiple of step",
        )
    return np.stack([height[allowed], width[allowed]], axis=1)


def assign(sizes_hw: Ints, shapes: Ints, *, area_weight: float, upscale_weight: float) -> Ints:
    """The index of the cheapest shape for each of (n, 2) picture sizes, as (n,).

    Among equals, the larger and then the squarer one: so a picture on its side goes to its bucket on its side.
    """
    preference = np.lexsort((shapes[:, 0], np.abs(_log_aspect(shapes)), -shapes.prod(axis=1)))
    ordered = shapes[preference]
    unique, back = _unique_rows(sizes_hw)
    best = np.empty(len(unique), dtype=np.int64)
    for start in range(0, len(unique), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        best[rows] = _cost(unique[rows], ordered, area_weight, upscale_weight).argmin(axis=1)
    return preference[best][back].astype(np.int64)


def _unique_rows(sizes_hw: Ints) -> tuple[Ints, Ints]:
    """Distinct sizes, and for each picture which one it has. Real sets have few."""
    packed, back = np.unique(sizes_hw[:, 0] << 32 | sizes_hw[:, 1], return_inverse=True)
    return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1), back


def _log_aspect(sizes_hw: Ints) -> Floats:
    return np.log(sizes_hw[:, 0]) - np.log(sizes_hw[:, 1])


def _cost(sizes_hw: Ints, shapes: Ints, area_weight: float, upscale_weight: float) -> Floats:
    """The cost (n, m) of each picture in each shape, up to a constant: ln A is left out."""
    log_sizes, log_shapes = np.log(sizes_hw), np.log(shapes)
    cost = np.abs(_log_aspect(shapes) - _log_aspect(sizes_hw)[:, None])
    cost -= area_weight * np.log(shapes.prod(axis=1))
    log_scale = np.maximum(*(log_shapes[:, axis] - log_sizes[:, axis, None] for axis in (0, 1)))
    cost += upscale_weight * np.maximum(log_scale, 0.0, out=log_scale)
    return cost


def plan(sizes_hw: Ints, repeats: Ints, shapes: Ints, *, min_count: int, area_weight: float, upscale_weight: float) -> BucketPlan:
    """Assigns (n, 2) sizes so that every bucket in use has at least `min_count` samples, or only one is left.

    The smallest bucket is dissolved first, each of its pictures into the next-best bucket in use. `repeats` (n,) counts
    a picture as so many samples.
    """
    chosen = assign(sizes_hw, shapes, area_weight=area_weight, upscale_weight=upscale_weight)
    counts = np.bincount(chosen, weights=repeats, minlength=len(shapes)).astype(np.int64)
    while np.count_nonzero(counts) > 1:
        used = np.flatnonzero(counts)
        smallest = used[np.argmin(counts[used])]
        if counts[smallest] >= min_count:
            break
        moved = np.flatnonzero(chosen == smallest)
        others = used[used != smallest]
        chosen[moved] = others[assign(sizes_hw[moved], shapes[others], area_weight=area_weight, upscale_weight=upscale_weight)]
        counts = np.bincount(chosen, weights=repeats, minlength=len(shapes)).astype(np.int64)
    used = np.flatnonzero(counts)
    used = used[np.lexsort((shapes[used, 1], shapes[used, 0]))]
    rank = np.zeros(len(shapes), dtype=np.int64)
    rank[used] = np.arange(len(used))
    return BucketPlan(shapes[used], rank[chosen])


@dataclass(frozen=True)
class BucketRow:
    """One bucket of the report. Cropped is the share of a picture's area that is cut off; enlarged the factor, if above 1."""

    height_px: int
    width_px: int
    num_pictures: int
    num_samples: int
    mean_cropped: float
    max_cropped: float
    num_enlarged: int
    max_enlarged: float


def fit_loss(sizes_hw: Ints, targets_hw: Ints) -> tuple[Floats, Floats]:
    """For (n, 2) pictures in (n, 2) buckets: the share of the area that is cropped, and the resize factor, each (n,)."""
    scale = (targets_hw / sizes_hw).max(axis=1)
    kept = targets_hw.prod(axis=1) / (scale**2 * sizes_hw.prod(axis=1))
    return np.maximum(1.0 - kept, 0.0), scale


def report(bucket_plan: BucketPlan, sizes_hw: Ints, repeats: Ints) -> tuple[BucketRow, ...]:
    """One row per bucket, in the plan's order."""
    cropped, scale = fit_loss(sizes_hw, bucket_plan.shapes[bucket_plan.assignment])
    rows = []
    for index, (height, width) in enumerate(bucket_plan.shapes):
        inside = bucket_plan.assignment == index
        rows.append(
            BucketRow(
                height_px=int(height),
                width_px=int(width),
                num_pictures=int(inside.sum()),
                num_samples=int(repeats[inside].sum()),
                mean_cropped=float(cropped[inside].mean()),
                max_cropped=float(cropped[inside].max()),
                num_enlarged=int((scale[inside] > 1).sum()),
                max_enlarged=float(max(1.0, scale[inside].max())),
            )
        )
    return tuple(rows)


def report_text(rows: Sequence[BucketRow]) -> str:
    """The rows as a table with a last line for all of them."""
    lines = [f"{'width x height':>14}  {'pictures':>8}  {'samples':>8}  {'cropped':>8}  {'at most':>8}  {'enlarged':>8}  {'at most':>8}"]
    for row in rows:
        enlarged = f"{row.num_enlarged:8}  {row.max_enlarged:7.2f}x" if row.num_enlarged else f"{'-':>8}  {'-':>8}"
        lines.append(
            f"{row.width_px:>6} x {row.height_px:<5}  {row.num_pictures:8}  {row.num_samples:8}"
            f"  {row.mean_cropped:8.1%}  {row.max_cropped:8.1%}  {enlarged}"
        )
    pictures = sum(row.num_pictures for row in rows)
    cropped = sum(row.mean_cropped * row.num_pictures for row in rows) / max(1, pictures)
    lines.append(
        f"{pictures} pictures in {len(rows)} buckets; {cropped:.1%} of their area is cropped,"
        f" {sum(row.num_enlarged for row in rows)} are smaller than their bucket and get enlarged"
    )
    return "\n".join(lines)
