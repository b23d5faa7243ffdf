"""Aspect-ratio buckets: the shapes in which pictures are trained, and which picture goes where.

A picture costs in a bucket of area `area_b`, in a tier of resolution R (so that R^2 is the tier's largest area),

    |ln(aspect_b / aspect)| + area_weight * ln(R_1^2 / area_b) + upscale_weight * max(0, ln(R / sqrt(area)))

with R_1 the largest tier's resolution: cropping, a bucket smaller than it could be, and enlarging each have their price.
The last term is what it takes to fill the tier at the picture's own aspect. So the size of a picture decides about its
tier, and its aspect alone about its bucket there. In each tier the buckets are chosen so that the total cost is least and
every bucket holds `min_count` samples: see `bucket_choice`. No picture is left out because its bucket would not be full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aquatint.data.bucket_choice import choose
from aquatint.data.bucket_sets import MIN_AREA_SHARE as MIN_AREA_SHARE
from aquatint.data.bucket_sets import BucketSet, Floats, Ints, aspects_of
from aquatint.data.bucket_sets import candidates as candidates

Sizes = npt.NDArray[np.integer]  # (n, 2), height and width
Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]
Int8s = npt.NDArray[np.int8]
Int32s = npt.NDArray[np.int32]

_ROWS_AT_ONCE = 1 << 16  # so that the columns of a portion stay in the cache of a core
_ROUNDING = 1e-6  # repeats as 32-bit numbers may add up to so much less than they should, as a share of `min_count`
_TOO_SMALL = -1


class Names(Protocol):
    """Names by row: a sequence, or a column that is read as it is asked."""

    def __getitem__(self, row: int, /) -> str: ...


@dataclass(frozen=True)
class Tiers:
    """The sets of shapes on offer, largest resolution first, and what decides between them."""

    sets: tuple[BucketSet, ...]
    max_upscale: float
    area_weight: float
    upscale_weight: float

    def choose(self, sizes_hw: Sizes) -> Int8s:
        """The cheapest tier of each picture (n,), or -1 where each would enlarge it more than `max_upscale`.

        Of equally cheap tiers it is the larger one. Where `upscale_weight` is at most twice `area_weight`, that makes it
        the largest tier that does not enlarge the picture too much.
        """
        tiers = np.empty(len(sizes_hw), dtype=np.int8)
        for rows in _portions(len(sizes_hw)):
            portion = sizes_hw[rows]
            prices = self._prices(portion)
            for price, bucket_set in zip(prices, self.sets, strict=True):
                doubtful = np.flatnonzero((portion < bucket_set.shapes.max(axis=0) / self.max_upscale).any(axis=1))
                price[doubtful[enlargement(portion[doubtful], bucket_set) > self.max_upscale]] = np.inf
            tiers[rows] = np.where(np.isfinite(prices).any(axis=0), prices.round(9).argmin(axis=0), _TOO_SMALL)
        return tiers

    def _prices(self, sizes_hw: Sizes) -> Floats:
        """What a picture pays for a tier itself, (tiers, n)."""
        if len(self.sets) == 1:
            return np.zeros((1, len(sizes_hw)))
        sides = np.log([bucket_set.resolution for bucket_set in self.sets])[:, None]
        log_sizes = np.log(sizes_hw[:, 0]) / 2 + np.log(sizes_hw[:, 1]) / 2
        prices: Floats = 2 * self.area_weight * (sides[0] - sides) + self.upscale_weight * np.maximum(0.0, sides - log_sizes)
        return prices


def enlargement(sizes_hw: Sizes, bucket_set: BucketSet) -> Floats:
    """How many times each picture would be enlarged in its cheapest shape, (n,): below 1 it is made smaller."""
    return fit_loss(sizes_hw, bucket_set.shapes[bucket_set.cheapest(aspects_of(sizes_hw))])[1]


@dataclass(frozen=True)
class BucketPlan:
    """`shapes` (m, 2) are the buckets in use as (height, width): tier by tier, the largest first, and there from tall to wide.

    `tier_of` (m,) is the resolution each belongs to, `assignment` (n,) each picture's bucket, or -1 for those that are
    `skipped`: row -> reason, which reads well after a file's name. `used` are the shapes of each tier that are in use, and
    `routes` the tier to which the pictures of each go.
    """

    shapes: Ints
    assignment: Int32s
    tier_of: Ints
    skipped: Mapping[int, str]
    tiers: Tiers
    used: tuple[BucketSet, ...]
    routes: Ints

    def place(self, sizes_hw: Sizes) -> Int32s:
        """The best buckets in use for other pictures (n, 2), as (n,); -1 if there is no bucket at all.

        Those too small for every tier go to the smallest.
        """
        if not len(self.shapes):
            return np.full(len(sizes_hw), -1, dtype=np.int32)
        chosen = self.tiers.choose(sizes_hw)
        return _assign(sizes_hw, np.where(chosen == _TOO_SMALL, len(self.used) - 1, chosen), self.used, self.routes)


def plan(
    sizes_hw: Sizes,
    repeats: Numbers,
    sets: Sequence[BucketSet],
    *,
    min_count: float,
    max_upscale: float = np.inf,
    area_weight: float = 0.5,
    upscale_weight: float = 1.0,
) -> BucketPlan:
    """Chooses buckets for (n, 2) pictures, so that each holds at least `min_count` samples, or only one is left.

    `repeats` (n,) counts a picture as so many samples; it may be below 1 or broken. A tier with fewer samples than
    `min_count` is closed, the one with the fewest first: its pictures go to the next smaller tier, or if there is none to
    the next larger one, where they may be enlarged more than `max_upscale`.
    """
    tiers = Tiers(tuple(sorted(sets, key=lambda one: -one.resolution)), max_upscale, area_weight, upscale_weight)
    chosen = tiers.choose(sizes_hw)
    samples = np.zeros(len(sets))
    for rows in _portions(len(sizes_hw)):
        samples += np.bincount(chosen[rows] + 1, repeats[rows], len(sets) + 1)[1:]
    enough = min_count * (1 - _ROUNDING)
    routes = _routes(samples, enough)
    used = tuple(
        offered.only(choose(offered, enough, lambda tier=tier: _members(sizes_hw, repeats, chosen, routes == tier)))  # type: ignore[misc]
        for tier, offered in enumerate(tiers.sets)
    )
    return BucketPlan(
        shapes=np.concatenate([one.shapes for one in used]),
        assignment=_assign(sizes_hw, chosen, used, routes),
        tier_of=np.repeat([one.resolution for one in used], [len(one) for one in used]),
        skipped=_reasons(sizes_hw, np.flatnonzero(chosen == _TOO_SMALL), tiers),
        tiers=tiers, used=used, routes=routes,
    )  # fmt: skip


def _portions(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, count))


def _routes(samples: Floats, enough: float) -> Ints:
    """Where the pictures of each tier go, (tiers,): to itself if it is kept open."""
    routes, samples = np.arange(len(samples)), samples.copy()
    while True:
        open_tiers = np.unique(routes)
        weakest = int(open_tiers[np.argmin(samples[open_tiers])])
        if len(open_tiers) == 1 or samples[weakest] >= enough:
            return routes
        smaller = open_tiers[open_tiers > weakest]
        target = int(smaller[0]) if len(smaller) else int(open_tiers[open_tiers < weakest][-1])
        routes[routes == weakest] = target
        samples[target] += samples[weakest]


def _members(sizes_hw: Sizes, repeats: Numbers, chosen: Int8s, here: npt.NDArray[np.bool_]) -> Iterator[tuple[Floats, Floats]]:
    """Aspects and samples of the pictures whose tiers are `here`, in portions."""
    here = np.append(here, False)  # the last is that of pictures which are too small
    for rows in _portions(len(sizes_hw)):
        inside = here[chosen[rows]]
        yield aspects_of(sizes_hw[rows])[inside], repeats[rows][inside].astype(np.float64)


def _assign(sizes_hw: Sizes, chosen: Int8s, used: Sequence[BucketSet], routes: Ints) -> Int32s:
    """The bucket of each picture (n,), -1 for those without a tier."""
    first = np.cumsum([0, *(len(one) for one in used)])
    assignment = np.full(len(sizes_hw), -1, dtype=np.int32)
    targets = np.append(routes, _TOO_SMALL)
    for rows in _portions(len(sizes_hw)):
        aspects, tiers = aspects_of(sizes_hw[rows]), targets[chosen[rows]]
        for tier in np.unique(routes):
            inside = tiers == tier
            assignment[rows][inside] = first[tier] + used[tier].cheapest(aspects[inside])
    return assignment


def _reasons(sizes_hw: Sizes, rows: Ints, tiers: Tiers) -> dict[int, str]:
    """Why these pictures are in no tier."""
    scales = np.min([enlargement(sizes_hw[rows], bucket_set) for bucket_set in tiers.sets], axis=0).tolist()
    return {
        row: f"is too small: {width} x {height} would be enlarged {_above(scale, tiers.max_upscale)} times,"
        f" and buckets.max_upscale is {tiers.max_upscale}"
        for row, scale, (height, width) in zip(rows.tolist(), scales, sizes_hw[rows].tolist(), strict=True)
    }


def _above(number: float, limit: float) -> str:
    """The number with so many digits that it is seen to be above the limit."""
    return next((text for digits in (1, 2, 3) if float(text := f"{number:.{digits}f}") > limit), str(number))


# What the plan amounts to


@dataclass(frozen=True)
class BucketRow:
    """One bucket of the report. Cropped is the share of a picture's area that is cut off; enlarged the factor, if above 1."""

    height_px: int
    width_px: int
    tier_px: int
    num_pictures: int
    num_samples: float
    mean_cropped: float
    max_cropped: float
    num_enlarged: int
    max_enlarged: float


@dataclass(frozen=True)
class Merged:
    """A shape that would have been the best for pictures of these `rows`, but for too few of them, and what its loss costs them.

    Cropped is the mean share of their area that is cut off; enlarged the largest factor, if above 1.
    """

    height_px: int
    width_px: int
    tier_px: int
    rows: Ints
    cropped_before: float
    cropped_after: float
    enlarged_before: float
    enlarged_after: float


def fit_loss(sizes_hw: Sizes, targets_hw: Sizes) -> tuple[Floats, Floats]:
    """For (n, 2) pictures in (n, 2) buckets: the share of the area that is cropped, and the resize factor, each (n,)."""
    heights, widths = (targets_hw[:, axis] / sizes_hw[:, axis] for axis in (0, 1))
    scale = np.maximum(heights, widths)
    cropped: Floats = 1.0 - np.minimum(heights, widths) / scale
    return cropped, scale


def report(bucket_plan: BucketPlan, sizes_hw: Sizes, repeats: Numbers) -> tuple[BucketRow, ...]:
    """One row per bucket, in the plan's order."""
    count = len(bucket_plan.shapes)
    pictures, samples, cropped_sum, enlarged = np.zeros((4, count))
    cropped_most, scale_most = np.zeros(count), np.ones(count)
    for rows in _portions(len(sizes_hw)):
        inside = bucket_plan.assignment[rows] >= 0
        buckets, sizes = bucket_plan.assignment[rows][inside], sizes_hw[rows][inside]
        cropped, scale = fit_loss(sizes, bucket_plan.shapes[buckets])
        pictures += np.bincount(buckets, minlength=count)
        samples += np.bincount(buckets, repeats[rows][inside], count)
        cropped_sum += np.bincount(buckets, cropped, count)
        enlarged += np.bincount(buckets, scale > 1, count)
        np.maximum.at(cropped_most, buckets, cropped)
        np.maximum.at(scale_most, buckets, scale)
    return tuple(
        BucketRow(
            height_px=int(height), width_px=int(width), tier_px=int(tier), num_pictures=int(pictures[b]), num_samples=float(samples[b]),
            mean_cropped=float(cropped_sum[b] / max(1, pictures[b])), max_cropped=float(cropped_most[b]),
            num_enlarged=int(enlarged[b]), max_enlarged=float(scale_most[b]),
        )
        for b, ((height, width), tier) in enumerate(zip(bucket_plan.shapes, bucket_plan.tier_of, strict=True))
    )  # fmt: skip


def merged(bucket_plan: BucketPlan, sizes_hw: Sizes) -> tuple[Merged, ...]:
    """The shapes that pictures (n, 2) would be in if a bucket could be as small as it likes, most pictures first."""
    offered = bucket_plan.tiers.sets
    first = np.cumsum([0, *(len(one) for one in offered)])
    in_use = np.concatenate([np.isin(one.ranks, used.ranks) for one, used in zip(offered, bucket_plan.used, strict=True)])
    best = _assign(sizes_hw, bucket_plan.tiers.choose(sizes_hw), offered, np.arange(len(offered)))
    moved = np.flatnonzero(~np.append(in_use, True)[best])
    moved = moved[np.argsort(best[moved], kind="stable")]
    shapes, starts = np.unique(best[moved], return_index=True)
    found = []
    for shape, rows in zip(shapes.tolist(), np.split(moved, starts[1:]), strict=False):
        tier = int(np.searchsorted(first, shape, side="right")) - 1
        wanted = offered[tier].shapes[shape - first[tier]]
        before = fit_loss(sizes_hw[rows], np.broadcast_to(wanted, (len(rows), 2)))
        after = fit_loss(sizes_hw[rows], bucket_plan.shapes[bucket_plan.assignment[rows]])
        found.append(
            Merged(
                height_px=int(wanted[0]), width_px=int(wanted[1]), tier_px=offered[tier].resolution, rows=rows,
                cropped_before=float(before[0].mean()), cropped_after=float(after[0].mean()),
                enlarged_before=max(1.0, float(before[1].max())), enlarged_after=max(1.0, float(after[1].max())),
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda one: (-len(one.rows), one.height_px, one.width_px)))


# In words


def report_text(rows: Sequence[BucketRow]) -> str:
    """The rows as a table with a last line for all of them. With several tiers, a column says which one a bucket is of."""
    tiered = len({row.tier_px for row in rows}) > 1
    title = f"{'tier':>5}  " if tiered else ""
    lines = [
        f"{'width x height':>14}  {title}{'pictures':>9}  {'samples':>9}  {'cropped':>8}  {'at most':>8}  {'enlarged':>8}  {'at most':>8}"
    ]
    for row in rows:
        tier = f"{row.tier_px:>5}  " if tiered else ""
        enlarged = f"{row.num_enlarged:8}  {row.max_enlarged:7.2f}x" if row.num_enlarged else f"{'-':>8}  {'-':>8}"
        lines.append(
            f"{row.width_px:>6} x {row.height_px:<5}  {tier}{row.num_pictures:9}  {round(row.num_samples, 1):9.10g}"
            f"  {row.mean_cropped:8.1%}  {row.max_cropped:8.1%}  {enlarged}"
        )
    pictures = sum(row.num_pictures for row in rows)
    cropped = sum(row.mean_cropped * row.num_pictures for row in rows) / max(1, pictures)
    lines.append(
        f"{_count(pictures, 'picture')} in {_count(len(rows), 'bucket')}; {cropped:.1%} of their area is cropped,"
        f" {sum(row.num_enlarged for row in rows)} are smaller than their bucket and get enlarged"
    )
    return "\n".join(lines)


def small_buckets(rows: Sequence[BucketRow], bucket_starts: npt.NDArray[np.integer], names: Names, *, limit: int = 8) -> str:
    """The names of the pictures in buckets of at most `limit` pictures, or nothing if there is no such bucket.

    `names` are in the order of the buckets, which begin at `bucket_starts` (m + 1,).
    """
    small = [index for index, row in enumerate(rows) if row.num_pictures <= limit]
    lines = [
        f"  {rows[index].width_px} x {rows[index].height_px}: "
        + ", ".join(names[row] for row in range(int(bucket_starts[index]), int(bucket_starts[index + 1])))
        for index in small
    ]
    return "\n".join([f"buckets of {limit} pictures or fewer, which are shown together again and again:", *lines]) if small else ""


def merged_text(shapes: Sequence[Merged], names: Names, *, limit: int = 8) -> str:
    """What `merged` found, with up to `limit` names each, or nothing. `names` are those of the pictures it was asked about."""
    lines = []
    for one in shapes:
        more = f" and {len(one.rows) - limit} more" if len(one.rows) > limit else ""
        enlarged = f", enlarged up to {one.enlarged_after:.2f}x" if one.enlarged_after > max(1.0, one.enlarged_before) + 0.005 else ""
        lines.append(
            f"  {one.width_px} x {one.height_px}: {one.cropped_before:.1%} -> {one.cropped_after:.1%} cropped{enlarged}: "
            + ", ".join(names[int(row)] for row in one.rows[:limit])
            + more
        )
    pictures = sum(len(one.rows) for one in shapes)
    are = "is not in its" if pictures == 1 else "are not in their"
    title = f"{_count(pictures, 'picture')} {are} best shape, because too few would share it:"
    return "\n".join([title, *lines]) if lines else ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
