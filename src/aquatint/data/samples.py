"""What samples can be made of, as columns: a million pictures are a handful of arrays, and no objects.

Rows of a bucket are neighbours, and within a bucket those of a source: that is how `sampler.Order` numbers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint8]  # (…, 16)
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]

NO_KEY = bytes(16)  # of a view without a mask


@dataclass(frozen=True)
class Words:
    """Texts as one column: UTF-8 bytes, and where each begins, (n + 1,)."""

    data: bytes
    starts: Int64s

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=starts[1:])
        return cls(b"".join(encoded), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> str:
        return self.data[self.starts[row] : self.starts[row + 1]].decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Ragged:
    """How many entries of another column belong to each row: entries `starts[row] … starts[row + 1] - 1`; starts is (n + 1,)."""

    starts: Int64s

    @classmethod
    def of(cls, counts: Sequence[int] | Int64s) -> Ragged:
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        return cls(starts)

    def __getitem__(self, row: int) -> range:
        return range(int(self.starts[row]), int(self.starts[row + 1]))


@dataclass(frozen=True)
class Samples:
    """`n` pictures with `V` cached views each, bucket by bucket.

    With flips, views alternate between a crop and its mirror image. The texts of a row are keys of cached embeddings
    with the weights they are drawn by, or, where texts are encoded as they are needed, the captions themselves.
    """

    names: Words
    bucket_starts: Int64s  # (buckets + 1,)
    sources: npt.NDArray[np.int16]  # (n,)
    latent_keys: Keys  # (n, V, 16)
    time_ids: Int32s  # (n, V, 6)
    loss_weights: Float32s  # (n,)
    text_of: Ragged
    text_keys: Keys  # (texts, 16); empty where texts are encoded as they are needed
    text_weights: Float32s  # (texts,), of a row adding up to 1
    captions: Words | None = None  # (texts,), instead of `text_keys`
    mask_keys: Keys | None = None  # (n, V, 16); NO_KEY where there is no mask

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def num_views(self) -> int:
        return int(self.latent_keys.shape[1])

    def bucket(self, index: int) -> range:
        return range(int(self.bucket_starts[index]), int(self.bucket_starts[index + 1]))

    def buckets(self) -> list[range]:
        return [self.bucket(index) for index in range(len(self.bucket_starts) - 1)]

    def latent_key(self, row: int, view: int) -> bytes:
        return bytes(self.latent_keys[row, view])

    def mask_key(self, row: int, view: int) -> bytes | None:
        """The key of the mask of a view, or None."""
        if self.mask_keys is None:
            return None
        key = bytes(self.mask_keys[row, view])
        return None if key == NO_KEY else key

    def text_key(self, text: int) -> bytes:
        return bytes(self.text_keys[text])

    def draw_text(self, row: int, number: float) -> int:
        """One of the row's texts, for a `number` in [0, 1)."""
        texts = self.text_of[row]
        if len(texts) == 1:
            return texts[0]
        shares = np.cumsum(self.text_weights[texts.start : texts.stop], dtype=np.float64)
        return texts[min(int(np.searchsorted(shares, number * shares[-1], side="right")), len(texts) - 1)]

    @cached_property
    def has_masks(self) -> bool:
        return self.mask_keys is not None and bool(self.mask_keys.any())


def by_bucket(buckets: npt.NDArray[np.integer], sources: npt.NDArray[np.integer], digests: Keys) -> Int64s:
    """The order of the rows of `Samples`, (n,): by bucket, source and content, so that renaming a file changes nothing."""
    words = np.ascontiguousarray(digests).view(">u8").reshape(-1, 2)
    return np.lexsort((words[:, 1], words[:, 0], sources, buckets)).astype(np.int64)
