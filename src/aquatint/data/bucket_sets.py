"""The shapes that a run can choose its buckets from, by name, and which of them suits a picture best.

What a picture pays in a shape depends on its aspect (width / height) alone: the distance from its aspect to the shape's,
and the price of the shape. So each shape of a set is the cheapest for one range of aspects, or for none.

`aquatint`    distance |ln(aspect / aspect_b)|, price area_weight * ln(resolution^2 / area_b)
`kohya`       distance |aspect - aspect_b|, no price, as in sd-scripts (BucketManager.select_bucket)
`novelai`     distance |ln(aspect / aspect_b)|, no price (NovelAI, bucketmanager.py), over the shapes of `kohya`
`sdxl_table`  the same distance over the 40 sizes of SDXL's pretraining (arXiv 2307.01952, appendix I)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from aquatint.errors import UsageError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
SetName = Literal["aquatint", "kohya", "novelai", "sdxl_table"]

MIN_AREA_SHARE = 0.85  # of resolution squared; smaller buckets would waste the memory that the largest one needs
UNET_STEP = 32  # sides in pixels must be multiples of it
TIE = 1e-12  # prices this close are equal, and the preference decides: so rounding errors never do
_TABLE_RESOLUTION = 1024
_TABLE_WIDTHS = {  # by height; 704 x 1344 has no counterpart on its side, in the paper either
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344), 768: (1344, 1280),
    832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024, 960), 1088: (960, 896), 1152: (896, 832), 1216: (832,),
    1280: (768,), 1344: (768,), 1408: (704,), 1472: (704,), 1536: (640,), 1600: (640,), 1664: (576,), 1728: (576,), 1792: (576,),
    1856: (512,), 1920: (512,), 1984: (512,), 2048: (512,),
}  # fmt: skip


@dataclass(frozen=True)
class BucketSet:
    """Shapes (m, 2) of one resolution as (height, width), sorted by aspect from tall to wide, and what a picture pays in each.

    `positions` (m,) are the aspects where distances are measured: logarithms, or if `linear` the aspects themselves.
    Among equally cheap shapes, that of lower `ranks` (m,) is taken.
    """

    resolution: int
    shapes: Ints
    positions: Floats
    prices: Floats
    ranks: Ints
    linear: bool = False

    def __len__(self) -> int:
        return len(self.shapes)

    def position_of(self, aspects: Floats) -> Floats:
        """Where pictures of these aspects are, on the scale of `positions`."""
        return aspects if self.linear else np.log(aspects)

    def aspect_at(self, positions: Floats) -> Floats:
        return positions if self.linear else np.exp(positions)

    def only(self, indices: npt.NDArray[np.integer]) -> BucketSet:
        """The set of these shapes, given in ascending order."""
        columns = (self.shapes[indices], self.positions[indices], self.prices[indices], self.ranks[indices])
        return BucketSet(self.resolution, *columns, self.linear)

    @cached_property
    def borders(self) -> Floats:
        """(m, m): up to and including this aspect, shape p (row) suits a picture better than shape q (column), for p < q.

        NaN where one of the two is the better one for all pictures, and below the diagonal.
        """
        rise = self.prices[None, :] - self.prices[:, None]
        gap = self.positions[None, :] - self.positions[:, None]
        preferred = np.where(self.ranks[:, None] < self.ranks[None, :], TIE, -TIE)
        border = (self.positions[None, :] + self.positions[:, None] + rise) / 2 + preferred
        return np.where(gap > np.abs(rise) + TIE, self.aspect_at(border), np.nan)

    @cached_property
    def cells(self) -> tuple[Ints, Floats]:
        """The shapes that are the cheapest for some aspect, (k,), and the aspects between them, (k - 1,), both ascending."""
        members: list[int] = []
        for shape in range(len(self)):
            if members and self._beats(members[-1], shape):
                continue
            while members and self._beats(shape, members[-1]):
                members.pop()
            members.append(shape)
        kept = np.array(members, dtype=np.int64)
        return kept, self.borders[kept[:-1], kept[1:]]

    def cheapest(self, aspects: Floats) -> Ints:
        """The index of the cheapest shape for pictures of these aspects (n,)."""
        members, borders = self.cells
        places: Ints = members[np.searchsorted(borders, aspects)]
        return places

    def cost(self, aspects: Floats, shapes: npt.NDArray[np.integer]) -> Floats:
        """What pictures of these aspects (n,) pay in these shapes (n,)."""
        total: Floats = np.abs(self.positions[shapes] - self.position_of(aspects)) + self.prices[shapes]
        return total

    def _beats(self, one: int, other: int) -> bool:
        """Whether `one` is at least as cheap for every picture. Of shapes with one aspect, the preferred one comes first."""
        return bool(abs(self.positions[other] - self.positions[one]) <= self.prices[other] - self.prices[one] + TIE)


def aspects_of(sizes_hw: npt.NDArray[np.integer]) -> Floats:
    """Width / height of (n, 2) sizes: equal fractions give equal numbers, whatever the sizes."""
    aspects: Floats = np.divide(sizes_hw[:, 1], sizes_hw[:, 0], dtype=np.float64)
    return aspects


def assign(sizes_hw: npt.NDArray[np.integer], bucket_set: BucketSet) -> Ints:
    """The index of the cheapest shape for each of (n, 2) picture sizes, as (n,)."""
    return bucket_set.cheapest(aspects_of(sizes_hw))


def bucket_sets(
    name: SetName,
    *,
    resolution: int,
    tiers: Sequence[int] = (),
    step: int,
    min_side: int,
    max_side: int,
    max_aspect: float,
    area_weight: float,
) -> tuple[BucketSet, ...]:
    """The named set at `resolution` and at each of the further `tiers`, largest first.

    `min_side` is for `resolution`; in other tiers it is as much shorter as they are smaller, down to a multiple of `step`.
    Raises UsageError if a tier has no shape.
    """
    found = []
    for tier in sorted({resolution, *tiers}, reverse=True):
        least = max(step, min_side * tier // resolution // step * step) if tier < resolution else min_side
        sides = {"resolution": tier, "step": step, "min_side": least, "max_side": max_side}
        if name == "aquatint":
            found.append(aquatint_set(**sides, max_aspect=max_aspect, area_weight=area_weight))
        elif name == "sdxl_table":
            found.append(table_set(tier))
        else:
            found.append(area_set(**sides, linear=name == "kohya"))
    return tuple(found)


def aquatint_set(*, resolution: int, step: int, min_side: int, max_side: int, max_aspect: float, area_weight: float) -> BucketSet:
    """All `candidates`. Of equally cheap shapes the larger, then the squarer: a picture on its side goes to its bucket on its side."""
    shapes = candidates(resolution=resolution, step=step, min_side=min_side, max_side=max_side, max_aspect=max_aspect)
    areas, squareness = shapes.prod(axis=1), np.abs(np.log(aspects_of(shapes)))
    order = np.lexsort((shapes[:, 0], squareness.round(12), -areas))
    return _make(resolution, shapes[order], prices=area_weight * np.log(resolution**2 / areas[order]))


def area_set(*, resolution: int, step: int, min_side: int, max_side: int, linear: bool) -> BucketSet:
    """The shapes of sd-scripts and NovelAI: for each side the longest other one with which the area is not exceeded, and a square.

    sd-scripts looks for a shape of exactly the picture's size first. That is the nearest one anyway: no two of these
    shapes have the same aspect. Among equally near ones it takes the narrower. Raises UsageError if there is no shape.
    """
    square, first = resolution // step * step, -(-min_side // step) * step
    found = {(square, square)} if min_side <= square <= max_side else set()
    for width in range(first, max_side + 1, step):
        height = min(max_side, resolution**2 // width // step * step)
        if height >= min_side:
            found |= {(height, width), (width, height)}
    if not found:
        raise _no_shape(resolution, step, min_side, max_side)
    shapes = np.array(sorted(found, key=lambda shape: shape[::-1]), dtype=np.int64)
    return _make(resolution, shapes, prices=np.zeros(len(shapes)), linear=linear)


def table_set(resolution: int) -> BucketSet:
    """The 40 sizes of appendix I of the SDXL paper, in proportion to `resolution`.

    Raises UsageError if they would not be multiples of 32 pixels then, which the UNet needs.
    """
    shapes = np.array([(height, width) for height, widths in _TABLE_WIDTHS.items() for width in widths], dtype=np.int64)
    scaled = shapes * resolution // _TABLE_RESOLUTION
    if (shapes * resolution % (_TABLE_RESOLUTION * UNET_STEP)).any():
        raise UsageError(
            f"the SDXL paper's table of sizes is for 1024 x 1024 pixels: at {resolution} its sides would not be multiples of {UNET_STEP}",
            hint='use a resolution of 512, 1024, 1536 or 2048 with it, or set buckets.set = "aquatint"',
        )
    return _make(resolution, scaled, prices=np.zeros(len(scaled)))


def _make(resolution: int, shapes: Ints, *, prices: Floats, linear: bool = False) -> BucketSet:
    """The set of these shapes, given in the order in which they are preferred."""
    aspects = aspects_of(shapes)
    order = np.argsort(aspects, kind="stable")
    positions = aspects[order] if linear else np.log(aspects[order])
    return BucketSet(resolution, shapes[order], positions, prices[order], order.astype(np.int64), linear)


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
        raise _no_shape(resolution, step, min_side, max_side)
    return np.stack([height[allowed], width[allowed]], axis=1)


def _no_shape(resolution: int, step: int, min_side: int, max_side: int) -> UsageError:
    return UsageError(
        f"no bucket has sides of {min_side} to {max_side} pixels in steps of {step} and about {resolution} x {resolution} pixels",
        hint="set buckets.min_side below and buckets.max_side above buckets.resolution, and resolution to a multiple of step",
    )
