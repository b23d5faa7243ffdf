"""Square crops of pictures, and the noise that their latents are drawn with, for training the autoencoder's decoder.

A picture is never enlarged, only reduced to the size that the UNet sees it at. Where it is cut is a function of the run's
seed and the sample's position, as the noise is, so any batch can be made at any time.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aquatint.data import crop as cropping
from aquatint.data.crop import Crop
from aquatint.data.image import BadImage, Decoded, decode_image, digest_picture
from aquatint.data.manifest import Manifest, Picture
from aquatint.data.places import Opener
from aquatint.data.sampler import Group, Order
from aquatint.diffusion.noise import draw_noise
from aquatint.errors import DataError
from aquatint.storage import storage_errors
from aquatint.utils.seeds import generator

Rows = npt.NDArray[np.int64]

LATENT_STRIDE = 8
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class PictureBatch:
    """`images` (B, 3, S, S) float32 in [-1, 1], and standard normal `noise` (B, 4, S / 8, S / 8) for their latents."""

    images: torch.Tensor
    noise: torch.Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> PictureBatch:
        return PictureBatch(self.images.to(device), self.noise.to(device), self.names)


@dataclass(frozen=True)
class CropReader:
    """Cuts squares of `side_px` out of pictures that are reduced to an area of at most `area_side_px` squared."""

    opener: Opener
    seed: int
    side_px: int
    area_side_px: int
    alpha_color: str
    max_pixels: int

    def read(self, pictures: Sequence[Picture], first_position: int) -> PictureBatch:
        """A batch for training: sample `i` is cut and noised by the generators of position `first_position + i`."""
        positions = range(first_position, first_position + len(pictures))
        places = [tuple(generator(self.seed, "vae-crop", position).random(2).tolist()) for position in positions]
        noise = draw_noise(self.seed, "vae-noise", positions, self._latent_shape)
        return self._batch(pictures, places, noise)

    def fixed(self, pictures: Sequence[Picture]) -> PictureBatch:
        """A batch to measure on: the middle of each picture, with noise that is keyed by its content."""
        noise = [draw_noise(0, f"vae-validation/{picture.digest.hex()}", [0], self._latent_shape) for picture in pictures]
        return self._batch(pictures, [(0.5, 0.5)] * len(pictures), torch.cat(noise))

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.side_px // LATENT_STRIDE
        return LATENT_CHANNELS, side, side

    def _batch(self, pictures: Sequence[Picture], places: Sequence[tuple[float, ...]], noise: torch.Tensor) -> PictureBatch:
        cuts = [
            cropping.apply(self._load(picture), square(picture.size_hw, self.side_px, self.area_side_px, (down, right)))
            for picture, (down, right) in zip(pictures, places, strict=True)
        ]
        images = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return PictureBatch(images.contiguous(), noise, tuple(picture.name for picture in pictures))

    def _load(self, picture: Picture) -> Decoded:
        """Raises DataError for a picture that is not what it was, or cannot be decoded; StorageError."""
        with storage_errors("read", Path(picture.place.path)), self.opener.open(picture.place) as file:
            content = io.BytesIO(file.read())
        if digest_picture(content) != picture.digest:
            raise DataError(f"{picture.name} changed while it was trained on", hint="start the same command again")
        try:
            content.seek(0)
            return decode_image(content, self.alpha_color, self.max_pixels)
        except BadImage as error:
            raise DataError(
                f"{picture.name} {error}",
                hint="mend it or take it out, then go on with --accept-changes; `aquatint cache build` finds all such pictures in one go",
            ) from error


def square(size_hw: tuple[int, int], side_px: int, area_side_px: int, position: tuple[float, float]) -> Crop:
    """A square cut at `position` (down, right in 0..1) out of a picture whose sides are `side_px` or more."""
    scale = min(1.0, max(area_side_px / math.sqrt(size_hw[0] * size_hw[1]), side_px / min(size_hw)))
    height, width = (max(side_px, round(side * scale)) for side in size_hw)
    top, left = (min(rest, int(share * (rest + 1))) for rest, share in zip((height - side_px, width - side_px), position, strict=True))
    return Crop(size_hw, (height, width), top, left, (side_px, side_px))


@dataclass(frozen=True)
class CropStream:
    """The training pictures in the order in which they come: row `i` of `order` is row `rows[i]` of the manifest."""

    manifest: Manifest
    rows: Rows
    order: Order
    reader: CropReader

    @property
    def digest(self) -> str:
        """Changes with anything that decides a batch."""
        reader, groups = self.reader, [(group.count, str(group.repeats)) for group in self.order.buckets[0]]
        settings = (reader.seed, reader.side_px, reader.area_side_px, reader.alpha_color.lower(), self.order.batch_size, groups)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(np.ascontiguousarray(self.manifest.digests[self.rows]))
        return digest.hexdigest()

    def batches(self, start: int, end: int, *, workers: int, prefetch: int) -> Generator[PictureBatch]:
        """Batches `start … end - 1`. With workers, threads make up to `prefetch` each ahead of what is asked for."""
        if workers == 0:
            yield from (self._job(index)() for index in range(start, end))
            return
        waiting: deque[Future[PictureBatch]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
        try:
            for index in range(start, end):
                waiting.append(pool.submit(self._job(index)))
                if len(waiting) >= workers * prefetch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _job(self, index: int) -> Callable[[], PictureBatch]:
        """What makes a batch. Which pictures it takes is settled here: the order remembers its epoch, and is no matter for threads."""
        _, chosen = self.order.batch(index)
        pictures = list(self.manifest.pictures(self.rows[list(chosen)]))
        return lambda: self.reader.read(pictures, index * self.order.batch_size)


def by_source(manifest: Manifest, rows: Rows, repeats: Sequence[Fraction]) -> tuple[Rows, tuple[Group, ...]]:
    """Rows sorted by source and content, so that no listing order matters, and the groups that `Order` counts."""
    sources = manifest.source_of[rows]
    keys = manifest.digests[rows].view(">u8").reshape(-1, 2)
    rows = rows[np.lexsort((keys[:, 1], keys[:, 0], sources))]
    counts = np.bincount(sources, minlength=len(repeats)).tolist()
    return rows, tuple(Group(count, times) for count, times in zip(counts, repeats, strict=True) if count)
