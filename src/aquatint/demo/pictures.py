"""The demo's pictures: one coloured shape on a plain ground, and a caption that says exactly what is there.

Few attributes, each stated by the caption, so that a small model learns to obey prompts within minutes and a program can
measure whether it does. Shapes are drawn from their signed distances, so edges are smooth at every size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aquatint.data.image import save_png
from aquatint.storage import write_text
from aquatint.utils.seeds import generator

COLORS = {
    "red": (214, 40, 40), "green": (42, 157, 62), "blue": (38, 84, 214), "yellow": (250, 204, 21),
}  # fmt: skip
GROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12)}
SHAPES = ("circle", "square", "triangle")
PLACES = {  # centre of the shape as a share of (height, width)
    "on the left": (0.5, 0.25), "on the right": (0.5, 0.75), "at the top": (0.25, 0.5), "at the bottom": (0.75, 0.5),
}  # fmt: skip
SIZES_HW = ((120, 120), (104, 138), (138, 104), (98, 147), (147, 98), (85, 170), (170, 85))  # seven aspect ratios


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    color: str
    shape: str
    place: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} {self.place}, {self.ground} background"


def draw(scene: Scene, size_hw: tuple[int, int], *, radius: float = 0.3, shift_yx: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """The picture as uint8 (H, W, 3). `radius` and `shift_yx` are shares of the shorter side."""
    height, width = size_hw
    short = min(size_hw)
    center_y, center_x = PLACES[scene.place][0] * height + shift_yx[0] * short, PLACES[scene.place][1] * width + shift_yx[1] * short
    y, x = np.mgrid[0:height, 0:width] + 0.5
    distance = _signed_distance(scene.shape, y - center_y, x - center_x, radius * short)
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    picture = cover * np.array(COLORS[scene.color]) + (1 - cover) * np.array(GROUNDS[scene.ground])
    return picture.round().astype(np.uint8)


def _signed_distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the edge of a shape around the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":  # equilateral, one corner up; its three edges are half-planes
        slope = np.sqrt(3) / 2
        return np.maximum(y - 0.62 * radius, slope * np.abs(x) - 0.5 * y - 0.62 * radius)
    raise ValueError(f"no shape {shape!r}")


def scenes() -> list[Scene]:
    """Every combination of color, shape, place and ground."""
    return [Scene(c, s, p, g) for c in COLORS for s in SHAPES for p in PLACES for g in GROUNDS]


def examples(count: int, seed: int) -> Iterator[tuple[Scene, np.ndarray]]:
    """`count` random scenes with their pictures, in all sizes. Every scene comes up before one comes twice."""
    everything = scenes()
    for index in range(count):
        lap, position = divmod(index, len(everything))
        scene = everything[generator(seed, "demo-order", lap).permutation(len(everything))[position]]
        rng = generator(seed, "demo-picture", index)
        size_hw = SIZES_HW[rng.integers(len(SIZES_HW))]
        yield scene, draw(scene, size_hw, radius=rng.uniform(0.27, 0.31), shift_yx=tuple(rng.uniform(-0.02, 0.02, 2)))


def write_pictures(folder: Path, *, count: int, seed: int) -> None:
    """Writes `shape-0000.png` and `shape-0000.txt`, and so on. Files that are there already are written again, the same."""
    for index, (scene, picture) in enumerate(examples(count, seed)):
        save_png(folder / f"shape-{index:04}.png", picture)
        write_text(folder / f"shape-{index:04}.txt", scene.caption + "\n")
