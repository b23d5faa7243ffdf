"""Fitting a picture to its bucket: how far it is resized, what is cut off, and what SDXL is told about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aquatint.data.image import Pixels, resize
from aquatint.utils.seeds import generator

SizeHW = tuple[int, int]


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


def apply(image: Pixels, crop: Crop) -> Pixels:
    """The picture as it is trained: uint8 `target_hw` + (3,). Only the part that is kept is ever resized."""
    if image.shape[:2] != crop.original_hw:
        raise ValueError(f"the picture is {image.shape[:2]}, the crop is for {crop.original_hw}")
    down, right = (crop.original_hw[axis] / crop.resized_hw[axis] for axis in (0, 1))
    bottom_edge, right_edge = crop.top + crop.target_hw[0], crop.left + crop.target_hw[1]
    box = (
        crop.top * down, crop.left * right,
        min(bottom_edge * down, crop.original_hw[0]), min(right_edge * right, crop.original_hw[1]),
    )  # fmt: skip
    kept = resize(image, crop.target_hw, box_tlbr=box)
    return kept[:, ::-1].copy() if crop.flipped else kept


def views(
    picture_digest: str, size_hw: SizeHW, target_hw: SizeHW, *, mode: Literal["center", "random"], variants: int, flip: bool
) -> tuple[Crop, ...]:
    """The crops of a picture that are cached, a function of its content.

    One in the centre, or `variants` random ones; with `flip` each is followed by its mirror image, so that the index
    is 2 * variant + flipped.
    """
    positions = [(0.5, 0.5)] if mode == "center" else [_position(picture_digest, index) for index in range(variants)]
    sides = (False, True) if flip else (False,)
    return tuple(fit(size_hw, target_hw, position=position, flipped=side) for position in positions for side in sides)


def _position(picture_digest: str, index: int) -> tuple[float, float]:
    down, right = generator(0, f"crop/{picture_digest}", index).random(2)
    return float(down), float(right)
