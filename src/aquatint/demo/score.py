"""Whether a picture shows what its prompt says, measured: ground, colour, place and shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aquatint.demo.pictures import COLORS, GROUNDS, PLACES, Scene

MIN_AREA = 0.02  # of the picture: less than this is a speck, not a shape
REACH = {"circle": 0.56, "square": 0.655, "triangle": 0.8}  # from the centroid to the far corners, over the root of the area


@dataclass(frozen=True)
class Seen:
    """What a picture shows, as far as it can be measured; None where nothing stands out."""

    ground: str
    color: str | None
    place: str | None
    shape: str | None

    def obeys(self, scene: Scene) -> bool:
        """Ground, colour and place are right. The shape is reported on its own."""
        return (self.ground, self.color, self.place) == (scene.ground, scene.color, scene.place)


def look(picture: np.ndarray) -> Seen:
    """Measures a picture, uint8 (H, W, 3): every pixel goes to the nearest known colour, then the colours are counted."""
    names = [*GROUNDS, *COLORS]
    palette = np.array([*GROUNDS.values(), *COLORS.values()], dtype=np.float32)
    distance = np.linalg.norm(picture[:, :, None].astype(np.float32) - palette, axis=3)
    nearest = distance.argmin(axis=2)
    border = np.concatenate([nearest[:4].ravel(), nearest[-4:].ravel(), nearest[:, :4].ravel(), nearest[:, -4:].ravel()])
    ground = names[np.bincount(border, minlength=len(names))[: len(GROUNDS)].argmax()]
    counts = np.bincount(nearest.ravel(), minlength=len(names))[len(GROUNDS) :]
    if counts.max() < MIN_AREA * nearest.size:
        return Seen(ground, None, None, None)
    color = int(counts.argmax()) + len(GROUNDS)
    return Seen(ground, names[color], _place(nearest == color), _shape(nearest == color))


def _place(mask: np.ndarray) -> str:
    rows, columns = np.nonzero(mask)
    center = np.array([rows.mean() / mask.shape[0], columns.mean() / mask.shape[1]])
    return min(PLACES, key=lambda place: float(np.linalg.norm(center - PLACES[place])))


def _shape(mask: np.ndarray) -> str:
    rows, columns = np.nonzero(mask)
    distances = np.hypot(rows - rows.mean(), columns - columns.mean())
    reach = np.percentile(distances, 99) / mask.sum() ** 0.5
    return min(REACH, key=lambda shape: abs(REACH[shape] - reach))
