"""Encoders that cost nothing, and pictures for them. Importable by worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from aquatint.data import crop
from aquatint.data.cache import LatentRequest, build_latents, crop_rows, latent_keys, latent_recipe
from aquatint.data.image import save_png
from aquatint.data.places import Opener, Place
from aquatint.data.shards import ShardStore

RECIPE = latent_recipe(alpha_color="#ffffff", encoder_digest="toy", precision="float32", dtype="float16")
SIZE_HW = (30, 40)


class ToyEncoder:
    """Means of 8 x 8 pixels, and how bright each is; pictures of one red give NaN, and those of another only in company.

    Writes into `log` how many pictures each batch has. Dies at a picture of red `deadly`, the first time.
    """

    digest = "toy"

    def __init__(
        self,
        *,
        nan: int | None = None,
        nan_in_company: int | None = None,
        precise: ToyEncoder | None = None,
        log: Path | None = None,
        seconds: float = 0.0,
        deadly: int | None = None,
        broken: Exception | None = None,
    ) -> None:
        self.nan, self.nan_in_company, self.precise = nan, nan_in_company, precise
        self.log, self.seconds, self.deadly, self.broken = log, seconds, deadly, broken
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
        reds = [round((float(image[0, 0, 0]) + 1) * 127.5) for image in images]
        self.batches.append(tuple(images.shape))
        self._misbehave(reds)
        mean = avg_pool2d(images, 8)
        encoded = torch.cat([mean, mean[:, :1], mean.abs(), mean[:, :1].abs()], dim=1)
        for row, red in enumerate(reds):
            if red == self.nan or (red == self.nan_in_company and len(images) > 1):
                encoded[row, 5, 0, 0] = torch.nan
        return encoded

    def _misbehave(self, reds: list[int]) -> None:
        time.sleep(self.seconds)
        if self.broken is not None:
            raise self.broken
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{len(reds)}\n")
        if self.deadly in reds and self.log is not None and not (mark := self.log.with_suffix(".died")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def make_toy(**settings: Any) -> ToyEncoder:
    """For `functools.partial`, which can be sent to another process."""
    return ToyEncoder(**settings)


def encoded_rows(log: Path) -> int:
    """How many pictures were encoded by the encoders that write into `log`."""
    return sum(map(int, log.read_text().split())) if log.exists() else 0


class ToyTexts:
    digest = "toy texts"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.batches.append(list(captions))
        return [self.one(caption, alone=len(captions) == 1) for caption in captions]

    def one(self, caption: str, *, alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.nan if "nan" in caption else torch.inf if "company" in caption and not alone else float(len(caption))
        return torch.full((77 * chunks_of(caption), 6), float(len(caption))), torch.full((4,), value)


def chunks_of(caption: str) -> int:
    return 1 + len(caption) // 20


def picture(folder: Path, red: int, size_hw: tuple[int, int] = SIZE_HW) -> tuple[Place, bytes]:
    """A file of one colour, and its digest."""
    path = folder / f"{red}.png"
    if not path.exists():
        save_png(path, np.full((*size_hw, 3), (red, 10, 20), dtype=np.uint8))
    return Place(str(path)), hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def request(folder: Path, red: int, target_hw: tuple[int, int] = (16, 24), *, flipped: bool = False) -> LatentRequest:
    place, digest = picture(folder, red)
    cut = crop.fit(SIZE_HW, target_hw, flipped=flipped)
    (key,) = latent_keys(np.frombuffer(digest, np.uint8)[None], crop_rows([cut]), RECIPE)
    return LatentRequest(key.tobytes(), place, digest, cut)


def build(store: ShardStore, requests: Iterable[LatentRequest], make_encoder: Any, **changes: Any) -> dict[bytes, str]:
    settings: dict[str, Any] = {
        "opener": Opener(), "alpha_color": "#ffffff", "max_pixels": 10**6, "dtype": "float16", "batch_size": 3, "shard_entries": 4,
    }  # fmt: skip
    return build_latents(store, requests, make_encoder, **(settings | changes))


def keys_of(store: ShardStore) -> set[bytes]:
    return set(map(bytes, store.keys()))


def files_of(folder: Path) -> dict[str, bytes]:
    """The shards of a folder."""
    paths = sorted(folder.iterdir()) if folder.exists() else []  # a builder may be killed before it makes the folder
    return {path.name: path.read_bytes() for path in paths if len(path.stem) == 32 and path.suffix == ".safetensors"}
