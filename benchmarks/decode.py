"""How fast does a photo become the pixels that are encoded, and how near are they to the exact ones?

    taskset -c 0 python -m benchmarks.decode

decodes JPEGs of 1, 4 and 12 megapixels (smooth colours, hard edges and grain; quality 92), covers 1152 x 896 with them and cuts the middle
out: with our own code, and with what there is besides. All take the same bytes from memory and take turns on one core. Megapixels are those
of the file. The exact pixels are Lanczos-3 in float64 over the fully decoded picture, never rounded; how near is PSNR in dB to them, over
all pictures of a size. What others need is not among the dependencies of the package; what is not installed is left out:

    pip install opencv-python-headless simplejpeg pyvips pyvips-binary
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from aquatint.data.crop import Crop, apply, fit, reductions_of
from aquatint.data.image import decode_image
from benchmarks.machine import has, keep, load, spread, versions

SIZES_HW = {"1 MP": (900, 1200), "4 MP": (1732, 2310), "12 MP": (3000, 4000)}
TARGET_HW = (896, 1152)
PICTURES, ROUNDS, QUALITY = 2, 7, 92
PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "simplejpeg": "simplejpeg", "pyvips": "pyvips-binary"}  # module -> name

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Way = Callable[[bytes, Crop], Pixels]


class Seconds(NamedTuple):
    clock: float
    processor: float


# Pictures


def photo(size_hw: tuple[int, int], seed: int, grain: float = 4.0) -> bytes:
    """A JPEG with what photos have: gradients, edges at any angle, fine texture in places, and grain."""
    rng = np.random.default_rng(seed)
    down, right = np.meshgrid(*(np.linspace(0, 1, side, dtype=np.float32) for side in size_hw), indexing="ij")
    picture = np.empty((*size_hw, 3), dtype=np.float32)
    for channel in range(3):
        waves = rng.uniform(1, 6, (4, 2)), rng.uniform(0, 6.3, 4)
        picture[..., channel] = 128 + 25 * sum(np.sin(a * down + b * right + phase) for (a, b), phase in zip(*waves, strict=True))
    for _ in range(12):
        angle, place, width = rng.uniform(0, 3.2), rng.uniform(0, 1, 2), rng.uniform(0.02, 0.2)
        across = np.cos(angle) * (down - place[0]) + np.sin(angle) * (right - place[1])
        picture[np.abs(across) < width] += rng.uniform(-35, 35, 3).astype(np.float32)
    texture = np.sin(300 * right + 20 * down) * np.sin(260 * down) * (np.hypot(down - 0.5, right - 0.5) < 0.25)
    picture += 12 * texture[..., None] + rng.normal(0, grain, picture.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def lanczos(num_in: int, num_out: int, low: float, high: float) -> Floats:
    """Weights (num_out, num_in) of Lanczos-3, widened for a reduction: what Pillow documents, in float64."""
    scale = (high - low) / num_out
    centres = low + (np.arange(num_out) + 0.5) * scale
    x = (np.arange(num_in) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def exact(data: bytes, crop: Crop) -> Floats:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)
    top, left, bottom, right = box(crop)
    rows, columns = lanczos(pixels.shape[0], TARGET_HW[0], top, bottom), lanczos(pixels.shape[1], TARGET_HW[1], left, right)
    return np.clip(np.stack([rows @ pixels[..., channel] @ columns.T for channel in range(3)], axis=-1), 0, 255)


def box(crop: Crop) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of the crop in the pixels of the file."""
    down, right = (crop.original_hw[axis] / crop.resized_hw[axis] for axis in (0, 1))
    return crop.top * down, crop.left * right, (crop.top + TARGET_HW[0]) * down, (crop.left + TARGET_HW[1]) * right


def psnr(found: list[Pixels], expected: list[Floats]) -> float:
    errors = [np.mean((one.astype(np.float64) - other) ** 2) for one, other in zip(found, expected, strict=True)]
    return round(float(10 * np.log10(255**2 / np.mean(errors))), 1)


# Ways


def ours(data: bytes, crop: Crop, reduction: int | None = None) -> Pixels:
    reduction = reduction or int(reductions_of(np.array(crop.to_row(), dtype=np.int32)))
    return apply(decode_image(io.BytesIO(data), "#ffffff", 1 << 30, reduction=reduction), crop)


def pillow(data: bytes, crop: Crop, *, draft: bool = False, reducing_gap: float | None = None) -> Pixels:
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (crop.resized_hw[1], crop.resized_hw[0]))
    return pillow_cut(image.convert("RGB"), crop, reducing_gap)


def pillow_cut(image: Image.Image, crop: Crop, reducing_gap: float | None = None) -> Pixels:
    """Of a picture that may have been decoded smaller than it is."""
    top, left, bottom, right = box(crop)
    down, across = image.height / crop.original_hw[0], image.width / crop.original_hw[1]
    part = left * across, top * down, min(right * across, image.width), min(bottom * down, image.height)
    size = TARGET_HW[1], TARGET_HW[0]
    return np.array(image.resize(size, Image.Resampling.LANCZOS, box=part, reducing_gap=reducing_gap))


def cut(resized: Pixels, crop: Crop) -> Pixels:
    return resized[crop.top : crop.top + TARGET_HW[0], crop.left : crop.left + TARGET_HW[1]]


def opencv() -> Way:
    import cv2

    cv2.setNumThreads(1)

    def way(data: bytes, crop: Crop) -> Pixels:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return cut(cv2.resize(pixels, crop.resized_hw[::-1], interpolation=cv2.INTER_AREA), crop)

    return way


def simplejpeg_area() -> Way:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    return lambda data, crop: cut(cv2.resize(simplejpeg.decode_jpeg(data), crop.resized_hw[::-1], interpolation=cv2.INTER_AREA), crop)


def simplejpeg_scaled() -> Way:
    """The decoder leaves frequencies out, in eighths, as long as the picture stays larger than needed."""
    import simplejpeg

    def way(data: bytes, crop: Crop) -> Pixels:
        height, width = crop.resized_hw
        return pillow_cut(Image.fromarray(simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=1)), crop)

    return way


def pyvips_thumbnail() -> Way:
    os.environ["VIPS_CONCURRENCY"] = "1"
    import pyvips

    def way(data: bytes, crop: Crop) -> Pixels:
        height, width = crop.resized_hw
        resized = pyvips.Image.thumbnail_buffer(data, width, height=height, size="force")
        return np.asarray(resized.crop(crop.left, crop.top, TARGET_HW[1], TARGET_HW[0]).numpy())

    return way


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {
        "ours": ours,
        "ours, whole": lambda data, crop: ours(data, crop, 1),
        "Pillow Lanczos": pillow,
        "Pillow Lanczos, reducing gap 3": lambda data, crop: pillow(data, crop, reducing_gap=3.0),
        "Pillow draft and Lanczos": lambda data, crop: pillow(data, crop, draft=True),
    }
    others = {
        "OpenCV area": (opencv, ("cv2",)),
        "simplejpeg and OpenCV area": (simplejpeg_area, ("cv2", "simplejpeg")),
        "simplejpeg scaled and Pillow Lanczos": (simplejpeg_scaled, ("simplejpeg",)),
        "pyvips thumbnail": (pyvips_thumbnail, ("pyvips",)),
    }
    return found | {name: make() for name, (make, needs) in others.items() if all(map(has, needs))}


# Measuring


def seconds_of(way: Way, files: list[bytes], crop: Crop) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    for data in files:
        way(data, crop)
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def measure(size_hw: tuple[int, int], contenders: dict[str, Way], pictures: int = PICTURES, rounds: int = ROUNDS) -> dict[str, object]:
    files, crop = [photo(size_hw, seed) for seed in range(pictures)], fit(size_hw, TARGET_HW)
    expected = [exact(data, crop) for data in files]
    quality = {name: psnr([way(data, crop) for data in files], expected) for name, way in contenders.items()}
    taken: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            taken[name].append(seconds_of(contenders[name], files, crop))
    megapixels = pictures * size_hw[0] * size_hw[1] / 1e6
    return {
        "size_hw": list(size_hw), "bytes": [len(data) for data in files],
        "ways": {
            name: {
                "psnr_db": quality[name],
                "megapixels_per_second": {
                    kind: spread([megapixels / getattr(one, kind) for one in seconds], 1) for kind in Seconds._fields
                },
                "times as fast as Pillow Lanczos": spread(
                    [other.processor / one.processor for one, other in zip(seconds, taken["Pillow Lanczos"], strict=True)], 2
                ),
            }
            for name, seconds in taken.items()
        },
    }  # fmt: skip


def draft_on_grain() -> dict[str, list[float]]:
    """PSNR of the decoder at half size, by how much larger than needed that still is, for grain of a standard deviation of 4, 10 and 25."""
    found = {}
    for left in (1.0, 1.25, 1.34, 1.67):
        size_hw = tuple(2 * round(side * left) for side in TARGET_HW)
        crop, files = fit(size_hw, TARGET_HW), [photo(size_hw, 0, grain) for grain in (4.0, 10.0, 25.0)]
        found[f"{left} times"] = [psnr([pillow(data, crop, draft=True)], [exact(data, crop)]) for data in files]
    return found


def main() -> None:
    random.seed(0)
    before, contenders = load(), ways()
    sizes = {name: measure(size_hw, contenders) for name, size_hw in SIZES_HW.items()}
    keep("decode_cpu", {
        "versions": versions() | {name: version(name) for module, name in PACKAGES.items() if has(module)},
        "target_hw": list(TARGET_HW), "quality": QUALITY, "pictures": PICTURES, "rounds": ROUNDS,
        "values": "lower quartile, median, upper quartile; times as fast by processor time", "load": {"before": before, "after": load()},
        "psnr_db of draft, by what it leaves, with grain 4, 10, 25": draft_on_grain(), "sizes": sizes,
    })  # fmt: skip


if __name__ == "__main__":
    main()
