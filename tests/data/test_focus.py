"""What stands out is found on scenes made for it, and a crop of the picture keeps it."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from aquatint.data.crop import apply, fit, position_for_focus
from aquatint.data.focus import FOCUS_VERSION, focus_point
from aquatint.data.image import Decoded, Pixels, resize
from aquatint.errors import UsageError

SKIN, HAIR, LIPS, SHIRT = (225, 172, 138), (70, 45, 30), (170, 60, 60), (60, 70, 90)


def landscape(size_hw: tuple[int, int], seed: int = 0) -> Pixels:
    """Pale sky over soft, dull grass."""
    height, width = size_hw
    random = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[: height // 2], picture[height // 2 :] = (150, 190, 230), (80, 105, 70)
    grass = resize(random.integers(0, 30, (height // 24, width // 16, 3), dtype=np.uint8), (height - height // 2, width))
    picture[height // 2 :] += grass
    return picture + random.integers(0, 4, picture.shape, dtype=np.uint8)


def disc(picture: Pixels, middle: tuple[float, float], radius: float, color: tuple[int, int, int] | Pixels) -> None:
    down, right = np.ogrid[: picture.shape[0], : picture.shape[1]]
    inside = (down - middle[0]) ** 2 + (right - middle[1]) ** 2 < radius**2
    picture[inside] = color if isinstance(color, tuple) else color[inside]


def portrait(picture: Pixels, middle: tuple[float, float], radius: float) -> None:
    """Shirt, hair, face, eyes and lips, whose middle is that of the face."""
    down, right = middle
    disc(picture, (down + 2.2 * radius, right), 1.6 * radius, SHIRT)
    disc(picture, (down - 0.3 * radius, right), 1.1 * radius, HAIR)
    disc(picture, middle, 0.85 * radius, SKIN)
    for side in (-0.35, 0.35):
        disc(picture, (down - 0.15 * radius, right + side * radius), 0.12 * radius, (250, 250, 250))
        disc(picture, (down - 0.15 * radius, right + side * radius), 0.06 * radius, (20, 20, 30))
    disc(picture, (down + 0.45 * radius, right), 0.14 * radius, LIPS)


def flowers(picture: Pixels, middle: tuple[float, float], radius: float) -> None:
    """Bright patches."""
    patches = np.random.default_rng(1).integers(0, 256, (picture.shape[0] // 10 + 1, picture.shape[1] // 10 + 1, 3), dtype=np.uint8)
    patches[..., 0] |= 128
    disc(picture, middle, radius, patches.repeat(10, axis=0).repeat(10, axis=1)[: picture.shape[0], : picture.shape[1]])


SCENES = [
    (subject, size_hw, (down, right))
    for subject in (portrait, flowers)
    for size_hw in ((480, 720), (720, 480), (560, 560))
    for down, right in ((0.3, 0.2), (0.3, 0.8), (0.7, 0.25), (0.65, 0.5))
]


@pytest.mark.parametrize(("subject", "size_hw", "share"), SCENES)
def test_the_point_lies_in_what_stands_out(subject, size_hw, share) -> None:
    picture = landscape(size_hw)
    middle = share[0] * size_hw[0], share[1] * size_hw[1]
    subject(picture, middle, 75)
    point = focus_point(picture)
    assert np.hypot(point[0] * size_hw[0] - middle[0], point[1] * size_hw[1] - middle[1]) < 75


def test_a_crop_for_the_point_keeps_the_head_that_the_middle_cuts_off() -> None:
    picture = landscape((900, 600))
    portrait(picture, (130, 300), 90)
    hair = np.abs(picture.astype(int) - HAIR).sum(axis=2) < 30

    def kept(position: tuple[float, float]) -> float:
        whole = Decoded.of(hair[:, :, None].repeat(3, axis=2).astype(np.uint8) * 255)
        cut = apply(whole, fit((900, 600), (600, 600), position=position))
        return float((cut > 127).sum() / (hair.sum() * 3))

    assert kept((0.5, 0.5)) < 0.5
    assert kept(position_for_focus((900, 600), (600, 600), focus_point(picture))) > 0.95


def test_the_same_picture_has_the_same_point_whatever_its_size() -> None:
    picture = landscape((480, 720))
    portrait(picture, (200, 500), 75)
    before = picture.copy()
    point = focus_point(picture)
    assert focus_point(picture) == point
    assert (picture == before).all()
    assert focus_point(picture.repeat(3, axis=0).repeat(3, axis=1)) == pytest.approx(point, abs=0.04)
    mirrored = focus_point(np.ascontiguousarray(picture[:, ::-1]))
    assert (mirrored[0], 1 - mirrored[1]) == pytest.approx(point, abs=0.08)


@pytest.mark.parametrize("size_hw", [(300, 300), (301, 457), (8, 8), (8, 4000), (4000, 8), (1, 1)])
@pytest.mark.parametrize("color", [0, 128, 255])
def test_a_picture_of_nothing_has_its_middle(size_hw: tuple[int, int], color: int) -> None:
    assert focus_point(np.full((*size_hw, 3), color, np.uint8)) == (0.5, 0.5)


@pytest.mark.parametrize("size_hw", [(8, 8), (9, 3000), (3000, 9), (700, 513)])
def test_a_point_lies_within_its_picture(size_hw: tuple[int, int]) -> None:
    point = focus_point(np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8))
    assert all(0 < share < 1 and isinstance(share, float) for share in point)


def test_a_photo_of_twelve_million_pixels_takes_moments() -> None:
    picture = landscape((480, 640)).repeat(6, axis=0).repeat(6, axis=1)
    focus_point(picture)
    start = time.perf_counter()
    focus_point(picture)
    assert time.perf_counter() - start < 0.5


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smartcrop", None)
    with pytest.raises(UsageError, match="needs the package smartcrop") as error:
        focus_point(landscape((64, 64)))
    assert error.value.hint == "pip install aquatint[focus]"


def test_golden_point() -> None:
    """Another point for the same picture must come with another version: points are kept, and decide what is cropped."""
    picture = landscape((480, 720))
    portrait(picture, (200, 500), 75)
    assert (FOCUS_VERSION, focus_point(picture)) == (1, (0.40625, 0.6666666666666666))
