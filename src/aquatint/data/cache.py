"""What is missing in the cache: found, encoded, packed.

A hit is a proof: a key is the digest of everything an entry depends on, so changing one thing makes exactly the affected
entries anew. What is missing is cut into jobs (`jobs`), each of which becomes one shard (`encoding`), here or in other
processes (`engines`). A crash or Ctrl-C costs the jobs under way, which are less than a shard or two of each process.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from aquatint.data import crop as cropping
from aquatint.data import image
from aquatint.data.crop import Crop
from aquatint.data.encoding import Entry, Work
from aquatint.data.engines import Engine, Local
from aquatint.data.image import BadImage, Decoded
from aquatint.data.jobs import OnFailure, OnProgress, Request, Todo, batched
from aquatint.data.places import Opener, Place
from aquatint.data.shards import Keys, ShardStore
from aquatint.storage import storage_errors

KEY_VERSION = 1  # raise it when keys are made of other things than before
PICTURE_VERSION = 1  # raise it when decoding, resizing or cropping gives other pixels than before
MASK_VERSION = 1  # and this one for masks
TEXT_VERSION = 1  # and this one when a text is cut into tokens or chunks in another way, or read from other layers
FILE_CHANGED = "was changed while the pictures were being encoded"  # no fault of the content that was listed
NOT_FINITE = "the autoencoder gives numbers that are not finite for it"  # which another autoencoder need not do
TEXT_NOT_FINITE = "the text encoders give numbers that are not finite for it"
LATENT_STRIDE = 8  # pixels of a picture per latent, along each side
_MAX_VIEWS = 8  # of one picture, cut out at once

Dtype = Literal["float16", "float32"]
Int32s = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]  # (H, W)
Content = TypeVar("Content")


class LatentEncoder(Protocol):
    """The autoencoder's first half. `digest` stands for its weights and everything else that decides its output.

    It may have an encoder `precise`, the same in float32: that one gets what has no finite latents otherwise.
    """

    @property
    def digest(self) -> str: ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Float32 images (B, 3, H, W) in [-1, 1] to (B, 8, h, w): the mean and the standard deviation, 4 channels each, unscaled."""
        ...


class CaptionEncoder(Protocol):
    """The text encoders. `digest` stands for their weights, the tokenizer and everything else that decides their output."""

    @property
    def digest(self) -> str: ...

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prompt embeddings (77 n, D) and pooled embedding (P,) of each caption, for its own number n of chunks."""
        ...


# Keys


def latent_recipe(*, alpha_color: str, encoder_digest: str, precision: str, dtype: Dtype) -> bytes:
    """A digest of all that latents depend on beside the picture and the crop: 16 bytes."""
    return _digest("latent", PICTURE_VERSION, alpha_color.lower(), encoder_digest, precision, dtype)


def mask_recipe(kind: Literal["alpha", "file"]) -> bytes:
    """A digest of all that masks depend on beside the file and the crop, for each way to get a mask out of a file: 16 bytes."""
    return _digest("mask", MASK_VERSION, PICTURE_VERSION, kind)


def text_recipe(*, encoder_digest: str, dtype: Dtype) -> bytes:
    """A digest of all that embeddings depend on beside the text: 16 bytes."""
    return _digest("text", TEXT_VERSION, encoder_digest, dtype)


def latent_keys(picture_digests: Keys, crops: Int32s, recipe: bytes, reductions: Int32s | None = None) -> Keys:
    """The keys (n, 16) of parts of pictures: digests (n, 16), and the numbers of their crops (n, 9).

    Where `reductions` (n,) are above 1, they are a tenth number: the picture is decoded so many times smaller.
    """
    keys = _part_keys(picture_digests, crops, recipe)
    if reductions is None or not (is_reduced := reductions > 1).any():
        return keys
    numbers = np.column_stack([crops[is_reduced], reductions[is_reduced]])
    keys[is_reduced] = _part_keys(picture_digests[is_reduced], numbers, recipe)
    return keys


def _part_keys(picture_digests: Keys, numbers: Int32s, recipe: bytes) -> Keys:
    raw = np.ascontiguousarray(numbers, dtype="<i4").view(np.uint8).reshape(len(picture_digests), 4 * numbers.shape[1])
    rows = np.concatenate([picture_digests, raw], axis=1)
    return _keys(memoryview(rows.tobytes()), np.arange(len(rows) + 1) * rows.shape[1], recipe)


mask_keys = latent_keys  # over the digests of the files that masks are made of, with a recipe for masks


def text_keys(captions: Iterable[str], recipe: bytes) -> Keys:
    """The keys (n, 16) of rendered captions."""
    texts = [caption.encode("utf-8", "surrogatepass") for caption in captions]
    return _keys(memoryview(b"".join(texts)), np.cumsum([0, *map(len, texts)]), recipe)


def crop_rows(crops: Sequence[Crop]) -> Int32s:
    """The numbers of crops, (n, 9), as in `crop.CROP_COLUMNS`."""
    return np.array([crop.to_row() for crop in crops], dtype=np.int32).reshape(-1, len(cropping.CROP_COLUMNS))


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps([KEY_VERSION, *parts]).encode(), digest_size=16).digest()


def _keys(data: memoryview, bounds: npt.NDArray[np.int64], recipe: bytes) -> Keys:
    """BLAKE2b-128 of the recipe and each piece of `data` between two bounds."""
    start = hashlib.blake2b(recipe, digest_size=16)
    places = bounds.tolist()

    def key(begin: int, end: int) -> bytes:
        digest = start.copy()
        digest.update(data[begin:end])
        return digest.digest()

    return np.frombuffer(bytearray().join(map(key, places, places[1:])), dtype=np.uint8).reshape(-1, 16)


# Requests


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """A part of a picture that shall be in the cache under `key`. `picture_digest` is that of the file's bytes.

    With a `reduction`, it is cut out of the picture decoded so many times smaller.
    """

    key: bytes
    place: Place
    picture_digest: bytes
    crop: Crop
    reduction: int = 1

    @property
    def subject(self) -> bytes:
        return self.picture_digest

    @property
    def shape(self) -> tuple[int, ...]:
        return self.crop.target_hw


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """A part of a mask that shall be in the cache: of a file of its own, or of the opacity (`alpha`) of a picture."""

    key: bytes
    place: Place
    mask_digest: bytes
    crop: Crop
    kind: Literal["alpha", "file"] = "file"

    @property
    def subject(self) -> bytes:
        return self.mask_digest

    @property
    def shape(self) -> tuple[int, ...]:
        return self.crop.target_hw


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A caption of `num_chunks` chunks that shall be in the cache under `key`."""

    key: bytes
    caption: str
    num_chunks: int

    @property
    def subject(self) -> bytes:
        return self.key

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_chunks,)


# Building


def build_latents(
    store: ShardStore,
    requests: Iterable[LatentRequest],
    make_encoder: Callable[[], LatentEncoder],
    *,
    opener: Opener,
    alpha_color: str,
    max_pixels: int,
    dtype: Dtype,
    batch_size: int,
    shard_entries: int,
    engine: Engine | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_failure: OnFailure = lambda digest, reason: None,
) -> dict[bytes, str]:
    """Encodes the requests that are not in the store, as entries of `moments` (8, h, w): the mean and the standard deviation.

    The encoder is made only if something is missing, by each process of the engine: this one, unless told otherwise.
    Neighbours among the requests that are cut from one picture are decoded once. Returns why pictures were left out, by
    digest: they cannot be decoded, their file is not the one that was listed, or the encoder gives no finite numbers for
    them; `on_failure` gets each as soon as it is known. `on_progress` gets how many of the missing entries are done, and
    how many there are. Raises StorageError, and AquatintError for what happened in another process; what was finished is
    kept.
    """
    work = LatentWork(make_encoder, opener, alpha_color, max_pixels, dtype, batch_size)
    return _build(store, requests, work, shard_entries, engine, on_progress, on_failure)


def build_masks(
    store: ShardStore,
    requests: Iterable[MaskRequest],
    *,
    opener: Opener,
    max_pixels: int,
    batch_size: int,
    shard_entries: int,
    engine: Engine | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_failure: OnFailure = lambda digest, reason: None,
) -> dict[bytes, str]:
    """Makes the masks that are not in the store, as entries of `mask` (1, h, w): float16 in [0, 1], means over 8 x 8 pixels.

    Returns why some were left out, by the digest of their file. Otherwise as `build_latents`.
    """
    return _build(store, requests, MaskWork(opener, max_pixels, batch_size), shard_entries, engine, on_progress, on_failure)


def build_texts(
    store: ShardStore,
    captions: Iterable[str],
    make_encoder: Callable[[], CaptionEncoder],
    *,
    recipe: bytes,
    num_chunks: Callable[[str], int],
    dtype: Dtype,
    batch_size: int,
    shard_entries: int,
    engine: Engine | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_failure: OnFailure = lambda key, reason: None,
) -> dict[str, str]:
    """Encodes the captions that are not in the store, as entries of `prompt_embeds` (77 n, D) and `pooled` (P,).

    `num_chunks` tells n, and is asked of what is missing. Returns why captions were left out, by caption (`on_failure` gets
    the key): the encoders give no finite numbers for them. Otherwise as `build_latents`.
    """
    captions = list(dict.fromkeys(captions))
    keys = text_keys(captions, recipe)
    store.refresh()
    left = np.flatnonzero(~store.has(keys))
    requests = {keys[row].tobytes(): TextRequest(keys[row].tobytes(), captions[row], num_chunks(captions[row])) for row in left}
    failures = _build(store, requests.values(), TextWork(make_encoder, dtype, batch_size), shard_entries, engine, on_progress, on_failure)
    return {requests[key].caption: reason for key, reason in failures.items()}


def _build(
    store: ShardStore,
    requests: Iterable[Request],
    work: Work,
    shard_entries: int,
    engine: Engine | None,
    on_progress: OnProgress,
    on_failure: OnFailure,
) -> dict[bytes, str]:
    store.remove_abandoned()
    store.refresh()
    todo = Todo(store, requests, shard_entries, on_progress=on_progress, on_failure=on_failure)
    try:
        with todo:
            if todo.total:
                (engine or Local()).run(todo, work, store.folder)
    finally:
        store.refresh()
    store.save_index()
    return todo.failures


# What is done with requests


@dataclass(frozen=True)
class LatentWork:
    """Pictures to latents. A batch is float32 (B, 3, H, W) in [-1, 1]."""

    make_encoder: Callable[[], LatentEncoder]
    opener: Opener
    alpha_color: str
    max_pixels: int
    dtype: Dtype
    batch_size: int
    not_finite: str = NOT_FINITE

    def build_encoder(self) -> LatentEncoder:
        return self.make_encoder()

    def together(self, requests: Sequence[LatentRequest]) -> Iterator[Sequence[LatentRequest]]:
        """Views of one picture, which is decoded once."""
        groups = groupby(requests, key=lambda request: (request.place, request.picture_digest, request.reduction))
        return chain.from_iterable(batched(views, _MAX_VIEWS) for _, views in groups)

    def room(self, requests: Sequence[LatentRequest]) -> npt.NDArray[np.float32]:
        return np.empty((len(requests), 3, *requests[0].crop.target_hw), dtype=np.float32)

    def prepare(self, requests: Sequence[LatentRequest], rows: Sequence[npt.NDArray[np.float32]]) -> str | None:
        load = partial(image.decode_image, alpha_color=self.alpha_color, max_pixels=self.max_pixels, reduction=requests[0].reduction)
        picture: Decoded | str = _read(self.opener, requests[0].place, requests[0].picture_digest, load)
        if isinstance(picture, str):
            return picture
        for request, row in zip(requests, rows, strict=True):
            pixels = cropping.apply(picture, request.crop).transpose(2, 0, 1)
            np.divide(pixels, np.float32(127.5), out=row, dtype=np.float32, casting="unsafe")
            np.subtract(row, np.float32(1.0), out=row)
        return None

    def encode(self, encoder: LatentEncoder, rows: npt.NDArray[np.float32], which: Sequence[int]) -> list[Entry]:
        images = torch.from_numpy(rows if len(which) == len(rows) else rows[which])
        encoded = encoder.encode(images).to("cpu", getattr(torch, self.dtype))
        return [{"moments": moments} for moments in encoded]


@dataclass(frozen=True)
class MaskWork:
    """Masks to the latent grid. A batch is float16 (B, 1, h, w); there is nothing left to encode."""

    opener: Opener
    max_pixels: int
    batch_size: int
    not_finite: str = ""

    def build_encoder(self) -> None:
        return None

    def together(self, requests: Sequence[MaskRequest]) -> Iterator[Sequence[MaskRequest]]:
        """Views of one mask, which is decoded once."""
        groups = groupby(requests, key=lambda request: (request.place, request.mask_digest, request.kind))
        return chain.from_iterable(batched(views, _MAX_VIEWS) for _, views in groups)

    def room(self, requests: Sequence[MaskRequest]) -> npt.NDArray[np.float16]:
        height, width = requests[0].crop.target_hw
        return np.empty((len(requests), 1, height // LATENT_STRIDE, width // LATENT_STRIDE), dtype=np.float16)

    def prepare(self, requests: Sequence[MaskRequest], rows: Sequence[npt.NDArray[np.float16]]) -> str | None:
        load = image.load_alpha if requests[0].kind == "alpha" else image.load_mask
        mask = _read(self.opener, requests[0].place, requests[0].mask_digest, lambda file: load(file, self.max_pixels))
        if isinstance(mask, str):
            return mask
        for request, row in zip(requests, rows, strict=True):
            row[0] = shrink_mask(cropping.apply_mask(mask, request.crop))
        return None

    def encode(self, encoder: None, rows: npt.NDArray[np.float16], which: Sequence[int]) -> list[Entry]:
        return [{"mask": torch.from_numpy(rows[row])} for row in which]


@dataclass(frozen=True)
class TextWork:
    """Captions to embeddings. A batch is a list of captions."""

    make_encoder: Callable[[], CaptionEncoder]
    dtype: Dtype
    batch_size: int
    not_finite: str = TEXT_NOT_FINITE

    def build_encoder(self) -> CaptionEncoder:
        return self.make_encoder()

    def together(self, requests: Sequence[TextRequest]) -> Iterator[Sequence[TextRequest]]:
        return batched(requests, self.batch_size)

    def room(self, requests: Sequence[TextRequest]) -> list[str]:
        return [request.caption for request in requests]

    def prepare(self, requests: Sequence[TextRequest], rows: Sequence[Any]) -> None:
        return None

    def encode(self, encoder: CaptionEncoder, rows: list[str], which: Sequence[int]) -> list[Entry]:
        number: torch.dtype = getattr(torch, self.dtype)
        pairs = encoder.encode([rows[row] for row in which])
        return [{"prompt_embeds": embeds.to("cpu", number), "pooled": pooled.to("cpu", number)} for embeds, pooled in pairs]


def shrink_mask(mask: Mask) -> npt.NDArray[np.float32]:
    """Means over 8 x 8 pixels of a mask (H, W), as shares of 255: (H / 8, W / 8)."""
    height, width = mask.shape
    blocks = mask.reshape(height // LATENT_STRIDE, LATENT_STRIDE, width // LATENT_STRIDE, LATENT_STRIDE)
    return np.asarray(blocks.sum(axis=(1, 3), dtype=np.uint32) / (255 * LATENT_STRIDE**2), dtype=np.float32)


def _read(opener: Opener, place: Place, digest: bytes, load: Callable[[io.BytesIO], Content]) -> Content | str:
    """A picture's content; or why there is none. Raises StorageError."""
    with storage_errors("read", Path(place.path)), opener.open(place) as file:
        content = io.BytesIO(file.read())
    if image.digest_picture(content) != digest:
        return FILE_CHANGED
    content.seek(0)
    try:
        return load(content)
    except BadImage as error:
        return str(error)
