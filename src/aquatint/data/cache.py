"""What is missing in the cache: found, encoded, packed.

A hit is a proof: a key is the digest of everything an entry depends on, so changing one thing makes exactly the affected
entries anew. Pictures are decoded in threads, ahead of the encoder, and encoded in batches of equal shape. A shard is
published as soon as it is full, so what a crash can cost is less than one shard; Ctrl-C costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch

from aquatint.data.crop import Crop, apply
from aquatint.data.image import BadImage, Pixels, digest_picture, load_image, quiet_decoders
from aquatint.data.shards import ShardStore
from aquatint.storage import storage_errors

PICTURE_VERSION = 1  # raise it when decoding, resizing or cropping gives other pixels than before
FILE_CHANGED = "was changed while the pictures were being encoded"  # no fault of the content that was listed
NOT_FINITE = "the autoencoder gives numbers that are not finite for it"  # which another autoencoder need not do
_MAX_THREADS = 8
_MAX_VIEWS = 8  # of one picture, held in memory at once

Dtype = Literal["float16", "float32"]
Entry = Mapping[str, torch.Tensor]
Progress = Callable[[int, int], None]
Input = TypeVar("Input")
Result = TypeVar("Result")


class LatentEncoder(Protocol):
    """The autoencoder's first half. `digest` stands for its weights and everything else that decides its output."""

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


@dataclass(frozen=True)
class LatentRequest:
    """A part of a picture that shall be in the cache under `key`. `picture_digest` is that of the file's bytes."""

    key: str
    path: Path
    picture_digest: str
    crop: Crop


def latent_key(picture_digest: str, crop: Crop, *, alpha_color: str, encoder_digest: str, precision: str, dtype: Dtype) -> str:
    """The key of a latent: it changes with the picture's bytes, the exact crop, the encoder, and how it computes and stores."""
    return _key("latent", PICTURE_VERSION, picture_digest, astuple(crop), alpha_color.lower(), encoder_digest, precision, dtype)


def text_key(caption: str, *, encoder_digest: str, dtype: Dtype) -> str:
    """The key of a caption's embeddings: it changes with the rendered text, the encoders, and how they are stored."""
    return _key("text", caption, encoder_digest, dtype)


def build_latents(
    store: ShardStore,
    requests: Iterable[LatentRequest],
    encoder: LatentEncoder,
    *,
    alpha_color: str,
    max_pixels: int,
    dtype: Dtype,
    batch_size: int,
    shard_entries: int,
    num_threads: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, str]:
    """Encodes the requests that are not in the store, as entries of `mean` and `std` (4, h, w).

    Returns why pictures were left out, by digest: they cannot be decoded, their file is not the one that was listed, or the
    encoder gives no finite numbers for them. Raises StorageError; what was encoded until then is kept. `on_progress` gets
    how many of the missing entries are done, and how many there are.
    """
    missing = _missing(store, {request.key: request for request in requests})
    views = sorted(missing.values(), key=lambda request: _largest_first(request.crop.target_hw))
    rejected: dict[str, str] = {}

    def encode(pictures: Sequence[Pixels]) -> list[Entry]:
        encoded = encoder.encode(_to_tensor(pictures)).to("cpu", getattr(torch, dtype))
        return [{"mean": mean, "std": std} for mean, std in zip(encoded[:, :4], encoded[:, 4:], strict=True)]

    def prepare(views: Sequence[LatentRequest]) -> list[Pixels] | BadImage:
        return _prepare(views, alpha_color, max_pixels)

    with _ahead(prepare, _by_picture(views), num_threads, depth=batch_size) as prepared:
        by_shape = groupby(_usable(prepared, rejected), key=lambda pair: pair[1].shape)
        batches = (batch for _, pairs in by_shape for batch in _batches(pairs, batch_size))
        failed = _encode_all(store, batches, encode, shard_entries, lambda done: on_progress(done + len(rejected), len(views)))
    return rejected | {missing[key].picture_digest: NOT_FINITE for key in failed}


def build_texts(
    store: ShardStore,
    captions: Iterable[str],
    encoder: CaptionEncoder,
    *,
    dtype: Dtype,
    batch_size: int,
    shard_entries: int,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, str]:
    """Encodes the captions that are not in the store, as entries of `prompt_embeds` (77 n, D) and `pooled` (P,).

    Returns why captions were left out, by caption: the encoders give no finite numbers for them. Otherwise as `build_latents`.
    """
    number: torch.dtype = getattr(torch, dtype)
    missing = _missing(store, {text_key(caption, encoder_digest=encoder.digest, dtype=dtype): caption for caption in captions})

    def encode(captions: Sequence[str]) -> list[Entry]:
        pairs = encoder.encode(captions)
        return [{"prompt_embeds": embeds.to("cpu", number), "pooled": pooled.to("cpu", number)} for embeds, pooled in pairs]

    batches = _batches(missing.items(), batch_size)
    failed = _encode_all(store, batches, encode, shard_entries, lambda done: on_progress(done, len(missing)))
    return {missing[key]: "the text encoders give numbers that are not finite for it" for key in failed}


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, default=int).encode(), digest_size=16).hexdigest()


def _missing(store: ShardStore, wanted: Mapping[str, Input]) -> dict[str, Input]:
    store.remove_abandoned()
    store.refresh()
    return {key: value for key, value in wanted.items() if key not in store}


def _largest_first(size_hw: tuple[int, int]) -> tuple[int, ...]:
    """Sort key: what does not fit into memory shall fail at once, not after hours."""
    return -size_hw[0] * size_hw[1], *size_hw


# Pictures


def _by_picture(views: Iterable[LatentRequest]) -> Iterator[list[LatentRequest]]:
    """Neighbours that are cut from the same file, so that it is decoded once."""
    for _, group in groupby(views, key=lambda view: (view.path, view.picture_digest)):
        yield from _batches(group, _MAX_VIEWS)


def _prepare(views: Sequence[LatentRequest], alpha_color: str, max_pixels: int) -> list[Pixels] | BadImage:
    """The views of one picture, cut out. Raises StorageError."""
    path = views[0].path
    try:
        picture = load_image(path, alpha_color, max_pixels)
    except BadImage as error:
        return error
    with storage_errors("read", path):
        digest = digest_picture(path)
    if digest != views[0].picture_digest:
        return BadImage(FILE_CHANGED)
    return [apply(picture, view.crop) for view in views]


@contextlib.contextmanager
def _ahead(
    work: Callable[[Input], Result], items: Iterable[Input], num_threads: int | None, *, depth: int
) -> Iterator[Iterator[tuple[Input, Result]]]:
    """Each item with the result of its work, in order; threads are up to `depth` results ahead of the reader."""
    num_threads = num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def results() -> Iterator[tuple[Input, Result]]:
        waiting: deque[tuple[Input, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > num_threads + depth:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        with quiet_decoders():
            yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _usable(
    prepared: Iterable[tuple[Sequence[LatentRequest], list[Pixels] | BadImage]], rejected: dict[str, str]
) -> Iterator[tuple[str, Pixels]]:
    """The key and pixels of each view; why a picture has none is put into `rejected`."""
    for views, pictures in prepared:
        if isinstance(pictures, BadImage):
            rejected[views[0].picture_digest] = str(pictures)
        else:
            yield from zip((view.key for view in views), pictures, strict=True)


def _to_tensor(pictures: Sequence[Pixels]) -> torch.Tensor:
    """uint8 (H, W, 3) each to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


# Encoding and packing


def _encode_all(
    store: ShardStore,
    batches: Iterable[list[tuple[str, Input]]],
    encode: Callable[[Sequence[Input]], list[Entry]],
    shard_entries: int,
    on_batch: Callable[[int], None],
) -> list[str]:
    """Encodes batches of (key, input) into the store, and returns the keys whose numbers are not finite."""
    failed: list[str] = []
    done = 0
    with _packing(store, shard_entries) as pack:
        for batch in batches:
            entries = _encode_finite(encode, [value for _, value in batch])
            pack({key: entry for (key, _), entry in zip(batch, entries, strict=True) if entry is not None})
            failed += [key for (key, _), entry in zip(batch, entries, strict=True) if entry is None]
            done += len(batch)
            on_batch(done)
    return failed


def _encode_finite(encode: Callable[[Sequence[Input]], list[Entry]], inputs: Sequence[Input]) -> list[Entry | None]:
    """An entry per input; one that is not finite is tried again alone, and is None if that does not help."""

    def retried(entry: Entry, value: Input) -> Entry | None:
        if _is_finite(entry):
            return entry
        (again,) = encode([value])
        return again if _is_finite(again) else None

    return [retried(entry, value) for entry, value in zip(encode(inputs), inputs, strict=True)]


def _is_finite(entry: Entry) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in entry.values())


@contextlib.contextmanager
def _packing(store: ShardStore, shard_entries: int) -> Iterator[Callable[[Mapping[str, Entry]], None]]:
    """A function that collects entries and publishes them once there are enough.

    A shard ends where a batch ends: a run that was killed then goes on with the same batches, and makes the same shards.
    """
    pending: dict[str, Entry] = {}

    def publish() -> None:
        entries = dict(pending)
        pending.clear()  # before the write: one that fails is not tried again on the way out
        store.write(entries)

    def pack(entries: Mapping[str, Entry]) -> None:
        pending.update(entries)
        if len(pending) >= shard_entries:
            publish()

    try:
        yield pack
    finally:
        publish()


def _batches(items: Iterable[Input], size: int) -> Iterator[list[Input]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
