"""Fitting pictures to their buckets: how far each is resized, what is cut off, and what SDXL is told about it.

`fit` says it for one picture, `fit_all` for a table of them, with the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aquatint.data.image import Decoded, Pixels, cut

SizeHW = tuple[int, int]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.uint8]  # (H, W)

CROP_COLUMNS = (
    "original_height", "original_width", "resized_height", "resized_width", "top", "left", "target_height", "target_width", "flipped",
)  # fmt: skip
_ORIGINAL, _RESIZED, _TOP, _LEFT, _TARGET, _FLIPPED = slice(0, 2), slice(2, 4), 4, 5, slice(6, 8), 8
_REDUCTIONS = (2, 4, 8)  # what a JPEG decoder offers
_SPARE = (4, 3)  # a quotient, of what is left to be resized by: with less, strong grain comes out different (docs/performance.md)


@dataclass(frozen=True)
class Crop:
    """A cut of `target_hw` at (`top`, `left`) out of the picture resized to `resized_hw`, mirrored afterwards if `flipped`.

    All in pixels; `original_hw` is the upright picture as it is in its file.
    """

    original_hw: SizeHW
    resized_hw: SizeHW
    top: int
    left: int
    target_hw: SizeHW
    flipped: bool = False

    @classmethod
    def from_row(cls, row: Sequence[int] | Integers) -> Crop:
        """Of the numbers that `CROP_COLUMNS` names."""
        height, width, resized_height, resized_width, top, left, target_height, target_width, flipped = map(int, row)
        return cls((height, width), (resized_height, resized_width), top, left, (target_height, target_width), bool(flipped))

    def to_row(self) -> tuple[int, ...]:
        """The numbers that `CROP_COLUMNS` names."""
        return (*self.original_hw, *self.resized_hw, self.top, self.left, *self.target_hw, int(self.flipped))

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning (arXiv 2307.01952, section 2.2): original h, w; crop top, left; target h, w.

        The crop is counted in the resized picture, and in the mirrored one if the picture is mirrored.
        """
        right = self.resized_hw[1] - self.target_hw[1] - self.left
        return (*self.original_hw, self.top, right if self.flipped else self.left, *self.target_hw)

    @property
    def scale(self) -> float:
        """How much the picture is enlarged (above 1) or reduced."""
        return max(self.resized_hw[0] / self.original_hw[0], self.resized_hw[1] / self.original_hw[1])


def fit(size_hw: SizeHW, target_hw: SizeHW, *, position: tuple[float, float] = (0.5, 0.5), flipped: bool = False) -> Crop:
    """The smallest resize that covers the target, and a cut out of it.

    `position` (down, right) in 0..1 says where the cut lies between the edges; each offset has the same share of it.
    """
    resized = _cover(size_hw, target_hw)
    top, left = (_offset(resized[axis] - target_hw[axis], position[axis]) for axis in (0, 1))
    return Crop(size_hw, resized, top, left, target_hw, flipped)


def _cover(size_hw: SizeHW, target_hw: SizeHW) -> SizeHW:
    """One side as the target's, the other rounded to the nearest pixel, in exact integers."""
    (height, width), (target_height, target_width) = size_hw, target_hw
    if target_height * width >= target_width * height:
        return target_height, max(target_width, (2 * width * target_height + height) // (2 * height))
    return max(target_height, (2 * height * target_width + width) // (2 * width)), target_width


def _offset(excess: int, position: float) -> int:
    return min(excess, int(position * (excess + 1)))


# Tables


def fit_all(sizes_hw: Integers, targets_hw: Integers, positions: Float64s, *, flip: bool = False) -> Int32s:
    """`fit` for each of (n, 2) sizes, targets and (n, V, 2) positions: the numbers of the crops, (n, V, 9), as in `CROP_COLUMNS`.

    With `flip` there are 2 V crops, each followed by its mirror image: the index is 2 * variant + flipped. Raises ValueError
    for a picture so long and thin that a side of the resized whole has no 32-bit number.
    """
    resized = _cover_all(sizes_hw, targets_hw)
    if resized.size and resized.max() > np.iinfo(np.int32).max:
        raise ValueError(f"a picture of {sizes_hw[resized.argmax() // 2].tolist()} pixels cannot be resized to cover its bucket")
    excess = (resized - targets_hw)[:, None]
    sides = 2 if flip else 1
    crops = np.empty((len(resized), positions.shape[1], sides, len(CROP_COLUMNS)), dtype=np.int32)
    crops[..., _ORIGINAL], crops[..., _RESIZED], crops[..., _TARGET] = (part[:, None, None] for part in (sizes_hw, resized, targets_hw))
    crops[..., _TOP : _LEFT + 1] = np.minimum(excess, (positions * (excess + 1)).astype(np.int64))[:, :, None]
    crops[..., _FLIPPED] = np.arange(sides)
    return crops.reshape(len(crops), positions.shape[1] * sides, len(CROP_COLUMNS))


def time_ids_of(crops: Int32s) -> Int32s:
    """`Crop.time_ids` of crops (…, 9), as (…, 6)."""
    right = crops[..., _RESIZED][..., 1] - crops[..., _TARGET][..., 1] - crops[..., _LEFT]
    left = np.where(crops[..., _FLIPPED] != 0, right, crops[..., _LEFT])
    ids = (crops[..., _ORIGINAL], crops[..., _TOP, None], left[..., None], crops[..., _TARGET])
    return np.concatenate(ids, axis=-1, dtype=np.int32)


def reductions_of(crops: Int32s) -> Int32s:
    """How much smaller, 1, 2, 4 or 8 times, the pictures of crops (…, 9) may be decoded, as (…).

    What is left is still 4/3 times as large in both directions as what it is resized to.
    """
    original, resized = (crops[..., part].astype(np.int64) for part in (_ORIGINAL, _RESIZED))
    ratios = _SPARE[1] * original // (_SPARE[0] * resized)
    found = np.ones(crops.shape[:-1], dtype=np.int32)
    for reduction in _REDUCTIONS:
        found[(ratios >= reduction).all(axis=-1)] = reduction
    return found


def random_positions(digests: npt.NDArray[np.uint8], variants: int) -> Float64s:
    """Positions (n, V, 2) in [0, 1) for pictures with digests (n, 16), a function of the content and the variant's number.

    Coordinate `c` (0 down, 1 right) of variant `v` is output `2 v + c` of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators") seeded with the digest's first word, XOR the second word, mixed once more; its upper 53 bits
    are the fraction. Words are little-endian.
    """
    words = np.ascontiguousarray(digests).view("<u8").astype(np.uint64).reshape(len(digests), 2)
    counters = np.arange(1, 2 * variants + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(_mix(words[:, :1] + counters) ^ words[:, 1:])
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, dtype=np.float64).reshape(-1, variants, 2)


def positions_for_focus(sizes_hw: Integers, targets_hw: Integers, points: Float64s) -> Float64s:
    """Positions (n, 2) with which `fit` centres crops as near to (n, 2) points (down, right in 0..1) as the pictures allow."""
    resized = _cover_all(sizes_hw, targets_hw)
    excess = resized - targets_hw
    offsets = np.clip(np.floor(points * resized - targets_hw / 2 + 0.5), 0, excess)
    return np.asarray((offsets + 0.5) / (excess + 1))  # the middle of the offset's share: safe from rounding


def position_for_focus(size_hw: SizeHW, target_hw: SizeHW, point: tuple[float, float]) -> tuple[float, float]:
    """The same for one picture."""
    down, right = positions_for_focus(np.array([size_hw]), np.array([target_hw]), np.array([point]))[0].tolist()
    return down, right


def _cover_all(sizes_hw: Integers, targets_hw: Integers) -> Int64s:
    """`_cover` for (n, 2) sizes and targets."""
    height, width = sizes_hw.astype(np.int64).T
    target_height, target_width = targets_hw.astype(np.int64).T
    is_wide = target_height * width >= target_width * height
    as_high = np.maximum(target_width, (2 * width * target_height + height) // (2 * height))
    as_wide = np.maximum(target_height, (2 * height * target_width + width) // (2 * width))
    return np.stack([np.where(is_wide, target_height, as_wide), np.where(is_wide, as_high, target_width)], axis=1)


def _mix(words: Words) -> Words:
    """SplitMix64's finalizer, modulo 2**64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


# Pixels


def apply(picture: Decoded, crop: Crop) -> Pixels:
    """The picture as it is trained: uint8 `target_hw` + (3,). Only the part that is kept is ever resized."""
    kept = cut(picture, _box(picture.size_hw, crop), crop.target_hw)
    return kept[:, ::-1].copy() if crop.flipped else kept


def apply_mask(mask: Mask, crop: Crop) -> Mask:
    """The mask of a picture, cut as the picture is: uint8 `target_hw`.

    Each pixel is the mean of the area it covers, so the mask's total weight is kept, and no ringing puts weight where there was none.
    """
    top, left, bottom, right = _box((mask.shape[0], mask.shape[1]), crop)
    kept = _area_means(mask, np.linspace(top, bottom, crop.target_hw[0] + 1))
    kept = _area_means(kept.T, np.linspace(left, right, crop.target_hw[1] + 1)).T
    return np.ascontiguousarray(np.rint(kept[:, ::-1] if crop.flipped else kept).astype(np.uint8))


def _box(size_hw: SizeHW, crop: Crop) -> tuple[float, float, float, float]:
    """Top, left, bottom and right edge of the crop in the picture as it is in its file."""
    if size_hw != crop.original_hw:
        raise ValueError(f"the picture is {size_hw}, the crop is for {crop.original_hw}")
    down, right = (crop.original_hw[axis] / crop.resized_hw[axis] for axis in (0, 1))
    bottom_edge, right_edge = crop.top + crop.target_hw[0], crop.left + crop.target_hw[1]
    return (
        crop.top * down, crop.left * right,
        min(bottom_edge * down, crop.original_hw[0]), min(right_edge * right, crop.original_hw[1]),
    )  # fmt: skip


def _area_means(values: npt.NDArray[np.uint8] | Float64s, edges: Float64s) -> Float64s:
    """Means over the parts of the first axis that lie between neighbouring edges, (len(edges) - 1, …). Edges may cut pixels."""
    whole = np.minimum(edges.astype(np.int64), len(values) - 1)
    sums = np.add.reduceat(values[: whole[-1] + 1], whole, axis=0, dtype=np.float64)[:-1]
    sums[whole[1:] == whole[:-1]] = 0.0  # between edges in one pixel, where reduceat would count it
    sums += np.diff((edges - whole)[:, None] * values[whole], axis=0)
    return np.asarray(sums / np.diff(edges)[:, None])
