"""What is missing is encoded once, what is there is left alone, and what is no number is never stored."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aquatint.data import cache, crop, image
from aquatint.data.cache import (
    LatentRequest,
    MaskRequest,
    build_masks,
    build_texts,
    crop_rows,
    latent_keys,
    latent_recipe,
    mask_keys,
    mask_recipe,
    text_keys,
    text_recipe,
)
from aquatint.data.engines import Local
from aquatint.data.image import decode_image, save_png
from aquatint.data.places import Opener, Place
from aquatint.data.shards import CorruptEntry, ShardStore
from aquatint.errors import StorageError
from tests.data import toys
from tests.data.toys import ToyEncoder, ToyTexts, chunks_of, files_of, keys_of, request

SHAPES = ((16, 24), (24, 16), (16, 16))
BAD_RED = 201  # a picture of this colour has no finite latent
GIVEN = {"alpha_color": "#ffffff", "encoder_digest": "vae", "precision": "float32", "dtype": "float16"}


def build(store: ShardStore, requests: Iterable[LatentRequest], encoder: ToyEncoder, **changes: Any) -> dict[bytes, str]:
    return toys.build(store, requests, lambda: encoder, **({"engine": Local(2)} | changes))


# Keys


def key_of(digest: bytes, cut: crop.Crop, recipe: bytes) -> bytes:
    return latent_keys(np.frombuffer(digest, np.uint8)[None], crop_rows([cut]), recipe).tobytes()


def test_a_latents_key_changes_with_everything_that_it_depends_on() -> None:
    cut = crop.fit((300, 200), (64, 64), position=(0.5, 0.5))
    changes = {
        "original_hw": [(301, 200), (300, 201)], "resized_hw": [(97, 64), (96, 65)], "top": [1], "left": [1],
        "target_hw": [(32, 64), (64, 32)], "flipped": [True],
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(cut)}
    cuts = [dataclasses.replace(cut, **{name: value}) for name, values in changes.items() for value in values]
    others = [
        GIVEN | change for change in ({"alpha_color": "#fffffe"}, {"encoder_digest": "x"}, {"precision": "bfloat16"}, {"dtype": "float32"})
    ]
    digest, recipe = bytes(range(16)), latent_recipe(**GIVEN)
    keys = {key_of(digest, cut, recipe), key_of(bytes(16), cut, recipe)}
    keys |= {key_of(digest, other, recipe) for other in cuts} | {key_of(digest, cut, latent_recipe(**other)) for other in others}
    assert len(keys) == 2 + 9 + 4
    assert all(len(key) == 16 for key in keys)


def test_a_key_is_the_digest_of_recipe_picture_and_crop() -> None:
    """Written down: keys that moved would make every cache worthless."""
    cut = crop.Crop((300, 200), (96, 64), 16, 0, (64, 64), flipped=True)
    numbers = np.array([300, 200, 96, 64, 16, 0, 64, 64, 1], dtype="<i4").tobytes()
    recipe = latent_recipe(**GIVEN)
    expected = hashlib.blake2b(recipe + bytes(range(16)) + numbers, digest_size=16).digest()
    assert key_of(bytes(range(16)), cut, recipe) == expected
    assert text_keys(["ä"], recipe).tobytes() == hashlib.blake2b(recipe + "ä".encode(), digest_size=16).digest()


def test_a_picture_that_is_decoded_smaller_has_another_key_and_the_others_have_theirs() -> None:
    digests, rows, recipe = np.arange(64, dtype=np.uint8).reshape(4, 16), crop_rows([crop.fit((900, 600), (64, 64))] * 4), bytes(16)
    whole = latent_keys(digests, rows, recipe)
    keys = latent_keys(digests, rows, recipe, np.array([1, 2, 1, 8], np.int32))
    assert (keys == whole).all(axis=1).tolist() == [True, False, True, False]
    numbers = np.array([*rows[3], 8], dtype="<i4").tobytes()
    assert bytes(keys[3]) == hashlib.blake2b(recipe + bytes(digests[3]) + numbers, digest_size=16).digest()
    assert len(np.unique(latent_keys(digests[[1] * 4], rows, recipe, np.array([1, 2, 4, 8], np.int32)), axis=0)) == 4
    assert np.array_equal(latent_keys(digests, rows, recipe, np.ones(4, np.int32)), whole)


@pytest.mark.parametrize("version", ["KEY_VERSION", "PICTURE_VERSION"])
def test_a_recipe_changes_with_the_way_pictures_are_made(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    before = latent_recipe(**GIVEN), mask_recipe("file")
    monkeypatch.setattr(cache, version, getattr(cache, version) + 1)
    assert latent_recipe(**GIVEN) != before[0]
    assert mask_recipe("file") != before[1]


def test_colours_are_the_same_in_capitals() -> None:
    assert latent_recipe(**GIVEN | {"alpha_color": "#ABCDEF"}) == latent_recipe(**GIVEN | {"alpha_color": "#abcdef"})


def test_masks_of_one_file_differ_by_the_way_they_are_made_and_from_latents() -> None:
    digest, rows = np.zeros((1, 16), np.uint8), crop_rows([crop.fit((300, 200), (64, 64))])
    recipes = (mask_recipe("alpha"), mask_recipe("file"), latent_recipe(**GIVEN))
    assert len({mask_keys(digest, rows, recipe).tobytes() for recipe in recipes}) == 3


def test_a_texts_key_changes_with_the_text_the_encoders_and_the_format() -> None:
    captions = ["", " ", "a", "ä", "a\n", "\udc80"]
    recipes = [text_recipe(encoder_digest=digest, dtype=dtype) for digest in ("x", "y") for dtype in ("float16", "float32")]
    keys = np.concatenate([text_keys(captions, recipe) for recipe in recipes])
    assert keys.shape == (24, 16)
    assert len(np.unique(keys, axis=0)) == 24
    assert np.array_equal(text_keys(captions, recipes[0]), keys[:6])
    assert text_keys([], recipes[0]).shape == (0, 16)


def test_keys_of_a_million_views_take_seconds() -> None:
    digests, rows = np.arange(1_600_000, dtype=np.int64).view(np.uint8).reshape(-1, 16)[:200_000], np.zeros((200_000, 9), np.int32)
    started = time.process_time()
    keys = latent_keys(digests, rows, bytes(16))
    assert time.process_time() - started < 4.0 / 5
    assert len(np.unique(keys, axis=0)) == 200_000


# Latents


def load(one: LatentRequest) -> Any:
    return decode_image(io.BytesIO(Path(one.place.path).read_bytes()), "#ffffff", 10**6, reduction=one.reduction)


def test_what_is_missing_is_encoded_and_can_be_read(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red, shape) for red in range(0, 250, 50) for shape in SHAPES]
    assert build(store, requests, encoder) == {}
    assert keys_of(store) == {one.key for one in requests}
    for one in requests:
        pixels = crop.apply(load(one), one.crop)
        images = torch.tensor(pixels.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
        expected = ToyEncoder().encode(images).half()[0]
        assert store.read(one.key)["moments"].equal(expected)


def test_a_hit_is_not_encoded_again(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red) for red in range(4)]
    build(store, requests, encoder)
    before, files = len(encoder.batches), files_of(store.folder)
    assert toys.build(ShardStore(store.folder), requests, pytest.fail) == {}  # not even the encoder is made
    assert files_of(store.folder) == files
    build(store, [*requests, request(tmp_path, 9)], encoder)
    assert encoder.batches[before:] == [(1, 3, 16, 24)]


def test_what_another_process_made_in_the_meantime_is_a_hit(tmp_path: Path) -> None:
    store, other, encoder = ShardStore(tmp_path / "cache"), ShardStore(tmp_path / "cache"), ToyEncoder()
    build(other, [request(tmp_path, 1)], ToyEncoder())
    build(store, [request(tmp_path, 1)], encoder)
    assert encoder.batches == []


def test_duplicates_are_encoded_once(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    build(store, [request(tmp_path, red) for red in (1, 2, 1, 1, 2)], encoder)
    assert encoder.batches == [(2, 3, 16, 24)]


def test_batches_hold_one_shape_and_the_largest_come_first(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    shapes = ((16, 16), (24, 32), (16, 24), (24, 16))
    build(store, [request(tmp_path, red, shape) for red in range(4) for shape in shapes], encoder)
    assert encoder.batches == [(count, 3, *shape) for shape in ((24, 32), (16, 24), (24, 16), (16, 16)) for count in (3, 1)]


def test_a_shard_holds_one_shape_and_no_more_than_it_may(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    build(store, [request(tmp_path, red, shape) for red in range(6) for shape in SHAPES], ToyEncoder())
    index = store.index
    sizes = np.bincount(index.shards)
    assert sorted(sizes) == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_a_picture_is_decoded_once_for_all_its_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    decoded: list[int] = []

    def count(file: Any, **rest: Any) -> Any:
        picture = decode_image(file, **rest)
        decoded.append(int(picture.pixels[0, 0, 0]))
        return picture

    monkeypatch.setattr(image, "decode_image", count)
    requests = [request(tmp_path, red, flipped=flipped) for red in (1, 2) for flipped in (False, True)]
    store = ShardStore(tmp_path / "cache")
    build(store, requests, ToyEncoder(), batch_size=batch_size)
    assert len(store) == 4
    assert sorted(decoded) == [1, 2]


def test_a_jpeg_is_cut_out_of_what_its_request_says(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    place, digest = Place(str(tmp_path / "a.jpg")), hashlib.blake2b((tmp_path / "a.jpg").read_bytes(), digest_size=16).digest()
    requests = [
        LatentRequest(bytes([reduction]) * 16, place, digest, crop.fit((96, 128), (16, 16)), reduction) for reduction in (1, 1, 2, 4)
    ]
    work = cache.LatentWork(ToyEncoder, Opener(), "#ffffff", 10**6, "float16", 4)
    groups = list(work.together(requests))
    assert [[one.reduction for one in group] for group in groups] == [[1, 1], [2], [4]]
    for group in groups:
        rows = work.room(group)
        assert work.prepare(group, rows) is None
        expected = crop.apply(load(group[0]), group[0].crop).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
        assert np.array_equal(rows[0], expected)


def test_views_that_lie_in_several_batches_are_all_right(tmp_path: Path) -> None:
    requests = [request(tmp_path, red, flipped=flipped) for red in range(5) for flipped in (False, True)]
    one, other = ShardStore(tmp_path / "one"), ShardStore(tmp_path / "other")
    build(one, requests, ToyEncoder(), batch_size=3, shard_entries=7)
    build(other, requests, ToyEncoder(), batch_size=2, shard_entries=7)
    assert files_of(one.folder) == files_of(other.folder)


def test_pictures_are_prepared_only_so_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    ahead: list[int] = []

    class Slow(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            ahead.append(len(decoded) - sum(batch[0] for batch in self.batches))
            return super().encode(images)

    def count(file: Any, **rest: Any) -> Any:
        decoded.append(file)
        return decode_image(file, **rest)

    monkeypatch.setattr(image, "decode_image", count)
    build(ShardStore(tmp_path / "cache"), [request(tmp_path, red) for red in range(40)], Slow(), batch_size=2)
    assert len(ahead) == 20
    assert max(ahead) <= 2 + 2 * 2 + 2  # the batch in the encoder, as many as two batches, and one for each thread


def test_progress_counts_what_was_missing(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    build(store, [request(tmp_path, 0)], ToyEncoder())
    seen: list[tuple[int, int]] = []
    build(store, [request(tmp_path, red) for red in range(6)], ToyEncoder(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 5), (4, 5), (5, 5)]  # a job of 4 in two batches, and one of 1


class Timed:
    """Sleeps as long as an encoder might take, and counts how long it was at it."""

    digest = "timed"

    def __init__(self) -> None:
        self.seconds = 0.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        time.sleep(0.02)
        latents = torch.zeros(len(images), 8, images.shape[2] // 8, images.shape[3] // 8)
        self.seconds += time.perf_counter() - started
        return latents


def test_the_encoder_hardly_ever_waits(tmp_path: Path) -> None:
    """512 JPEGs of 512 x 512 in batches of 4, 20 ms each: all the rest happens meanwhile, also between the 8 shards."""
    requests = list(jpegs(tmp_path, side=512, count=512))
    shares = []
    for attempt in range(3):
        encoder, started = Timed(), time.perf_counter()
        store = ShardStore(tmp_path / f"cache-{attempt}")
        build(store, requests, encoder, batch_size=4, shard_entries=64)
        shares.append(encoder.seconds / (time.perf_counter() - started))
        assert len(store) == 512
        if shares[-1] >= 0.85:
            return
    if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        pytest.skip("the machine is too busy to tell")
    pytest.fail(f"the encoder was at work for {max(shares):.0%} of the time at best")


def test_the_next_shards_pictures_are_prepared_while_one_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Event()

    def tell(file: Any, **rest: Any) -> Any:
        picture = decode_image(file, **rest)
        if picture.pixels[0, 0, 0] == 4:  # the first one of the second shard
            prepared.set()
        return picture

    class Patient(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            assert len(self.batches) < 1 or prepared.wait(10)  # in the last batch of the first shard
            return super().encode(images)

    monkeypatch.setattr(image, "decode_image", tell)
    build(ShardStore(tmp_path / "cache"), [request(tmp_path, red) for red in range(8)], Patient(), batch_size=2)


def test_the_next_shard_is_encoded_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Event()
    write = ShardStore.write

    def slow(self: ShardStore, entries: Any) -> str | None:
        assert encoded.wait(10)
        return write(self, entries)

    class Telling(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            if len(self.batches) == 2:  # two batches were the first shard
                encoded.set()
            return super().encode(images)

    monkeypatch.setattr(ShardStore, "write", slow)
    store = ShardStore(tmp_path / "cache")
    build(store, [request(tmp_path, red) for red in range(8)], Telling(), batch_size=2)
    assert len(store) == 8


def test_shards_that_wait_to_be_written_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk holds the encoder up, instead of filling the memory."""
    write, written, waiting = ShardStore.write, [], []

    def slow(self: ShardStore, entries: Any) -> str | None:
        time.sleep(0.02)
        written.append(len(entries))
        return write(self, entries)

    class Watched(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            waiting.append(len(self.batches) - len(written))
            return super().encode(images)

    monkeypatch.setattr(ShardStore, "write", slow)
    build(ShardStore(tmp_path / "cache"), [request(tmp_path, red) for red in range(20)], Watched(), batch_size=2, shard_entries=2)
    assert max(waiting) <= 2


def jpegs(folder: Path, *, side: int, count: int) -> Iterable[LatentRequest]:
    """Requests for pictures as cameras make them, of some 90 kB each; of only a few files, for they are slow to write."""
    dice, folder = np.random.default_rng(0), folder / "jpegs"
    folder.mkdir()
    coarse = Image.fromarray(dice.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    files = []
    for number in range(8):
        pixels = np.roll(smooth, 50 * number, axis=1) + dice.integers(-12, 13, (side, side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        files.append(folder / f"{number}.jpg")
    digests = [hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in files]
    for number in range(count):
        which = number % len(files)
        yield LatentRequest(number.to_bytes(16, "big"), Place(str(files[which])), digests[which], crop.fit((side, side), (side, side)))


# Pictures that cannot be used


def test_bad_pictures_are_reported_by_digest_and_the_rest_is_stored(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in range(6)]
    changed = requests[4]
    save_png(Path(changed.place.path), np.full((30, 40, 3), 77, dtype=np.uint8))
    damaged = damage(tmp_path, requests[1])
    told: list[tuple[bytes, str]] = []
    rejected = build(store, [damaged, *requests[2:]], ToyEncoder(), on_failure=lambda digest, reason: told.append((digest, reason)))
    assert rejected.keys() == {damaged.picture_digest, changed.picture_digest}
    assert "is a damaged PNG file" in rejected[damaged.picture_digest]
    assert rejected[changed.picture_digest] == cache.FILE_CHANGED
    assert told == list(rejected.items())
    assert keys_of(store) == {one.key for one in requests[2:]} - {changed.key}


def damage(folder: Path, one: LatentRequest) -> LatentRequest:
    """A request for a file that was cut off before it was listed."""
    path = folder / "damaged.png"
    path.write_bytes(Path(one.place.path).read_bytes()[:60])
    return dataclasses.replace(one, place=Place(str(path)), picture_digest=hashlib.blake2b(path.read_bytes(), digest_size=16).digest())


def test_a_file_that_was_cut_off_since_it_was_listed_is_no_fault_of_what_was_listed(tmp_path: Path) -> None:
    one = request(tmp_path, 1)
    Path(one.place.path).write_bytes(b"")
    assert build(ShardStore(tmp_path / "cache"), [one], ToyEncoder()) == {one.picture_digest: cache.FILE_CHANGED}


def test_a_picture_that_fails_in_every_view_is_told_of_once_and_early(tmp_path: Path) -> None:
    damaged = damage(tmp_path, request(tmp_path, 1))
    views = [dataclasses.replace(damaged, key=bytes([number] * 16)) for number in range(5)]
    events: list[Any] = []
    build(
        ShardStore(tmp_path / "cache"), [*views, *(request(tmp_path, red) for red in range(2, 12))], ToyEncoder(),
        on_failure=lambda digest, reason: events.append(digest), on_progress=lambda done, total: events.append(done),
    )  # fmt: skip
    assert events[0] == damaged.picture_digest
    assert events.count(damaged.picture_digest) == 1
    assert events[-1] == 15  # what failed is done with, too


def test_a_picture_without_finite_numbers_is_reported_and_never_stored(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in (1, BAD_RED, 2, 3)]
    rejected = build(store, requests, ToyEncoder(nan=BAD_RED))
    assert rejected == {requests[1].picture_digest: "the autoencoder gives numbers that are not finite for it"}
    assert keys_of(store) == {requests[index].key for index in (0, 2, 3)}


def test_what_is_not_finite_is_tried_again_alone(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder(nan_in_company=BAD_RED)
    requests = [request(tmp_path, red) for red in (1, BAD_RED, 2)]
    assert build(store, requests, encoder) == {}
    assert encoder.batches == [(3, 3, 16, 24), (1, 3, 16, 24)]
    assert all(bool(tensor.isfinite().all()) for one in requests for tensor in store.read(one.key).values())


def test_what_is_not_finite_in_half_precision_is_tried_again_in_full(tmp_path: Path) -> None:
    precise = ToyEncoder()
    half = ToyEncoder(nan=BAD_RED, precise=precise)
    requests = [request(tmp_path, red) for red in (1, BAD_RED, 2)]
    store, clean = ShardStore(tmp_path / "cache"), ShardStore(tmp_path / "clean")
    assert build(store, requests, half) == {}
    assert half.batches == [(3, 3, 16, 24)]
    assert precise.batches == [(1, 3, 16, 24)]
    build(clean, requests, ToyEncoder())
    assert files_of(store.folder) == files_of(clean.folder)
    hopeless = ToyEncoder(nan=BAD_RED, precise=ToyEncoder(nan=BAD_RED))
    assert len(build(ShardStore(tmp_path / "hopeless"), requests, hopeless)) == 1


def test_numbers_too_large_for_the_storage_format_are_not_stored(tmp_path: Path) -> None:
    class Large(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode(images) * 1e6

    half, single = ShardStore(tmp_path / "half"), ShardStore(tmp_path / "single")
    assert len(build(half, [request(tmp_path, 1)], Large())) == 1
    assert len(half) == 0
    assert build(single, [request(tmp_path, 1)], Large(), dtype="float32") == {}


def test_a_disk_that_fails_stops_the_build_and_names_the_file(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in range(9)]
    Path(requests[8].place.path).unlink()
    with pytest.raises(StorageError, match=f"could not read {requests[8].place.path}"):
        build(store, requests, ToyEncoder(), batch_size=1)
    assert keys_of(store) == {one.key for one in requests[:8]}  # the finished shards


# Interruptions


def interrupt_at(batch: int) -> Callable[[int, int], None]:
    calls = iter(range(1000))

    def progress(done: int, total: int) -> None:
        if next(calls) == batch:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_keeps_finished_shards_and_lets_others_go_on(tmp_path: Path) -> None:
    store, clean = ShardStore(tmp_path / "cache"), ShardStore(tmp_path / "clean")
    requests = [request(tmp_path, red) for red in range(12)]
    with pytest.raises(KeyboardInterrupt):
        build(store, requests, ToyEncoder(), batch_size=2, on_progress=interrupt_at(4))
    assert keys_of(store) == {one.key for one in requests[:8]}
    assert list((store.folder / "claims").iterdir()) == []
    encoder = ToyEncoder()
    build(store, requests, encoder, batch_size=2)
    assert encoder.batches == [(2, 3, 16, 24)] * 2
    build(clean, requests, ToyEncoder(), batch_size=2)
    assert files_of(store.folder) == files_of(clean.folder)


def test_a_full_disk_is_reported_once_and_what_was_published_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path / "cache")
    attempts: list[int] = []
    write = ShardStore.write

    def full(self: ShardStore, entries: Any) -> str | None:
        attempts.append(len(entries))
        if len(attempts) > 1:
            raise StorageError("the disk is full", hint="free some space")
        return write(self, entries)

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        build(store, [request(tmp_path, red) for red in range(12)], ToyEncoder(), shard_entries=3)
    assert len(store) == 3
    assert len(attempts) <= 4  # those that were already on their way


def test_a_damaged_entry_is_made_again_with_its_shard_and_nothing_else(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red) for red in range(6)]
    build(store, requests, encoder, shard_entries=3)
    path = store.folder / store.index.find(requests[4].key).shard  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    place = content.index(store.read(requests[4].key)["moments"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptEntry):
        [ShardStore(store.folder).read(one.key) for one in requests]
    encoder.batches.clear()
    build(store, requests, encoder, shard_entries=3)
    assert encoder.batches == [(3, 3, 16, 24)]
    assert path.exists()
    assert all(ShardStore(store.folder).read(one.key) for one in requests)


# Masks


def mask_request(folder: Path, mask: Any, target_hw: tuple[int, int], *, kind: Any = "file") -> MaskRequest:
    path = folder / "mask.png"
    Image.fromarray(mask).save(path)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    cut = crop.fit(mask.shape[:2], target_hw)
    key = mask_keys(np.frombuffer(digest, np.uint8)[None], crop_rows([cut]), mask_recipe(kind)).tobytes()
    return MaskRequest(key, Place(str(path)), digest, cut, kind)


def masks(store: ShardStore, requests: Iterable[MaskRequest]) -> dict[bytes, str]:
    return build_masks(store, requests, opener=Opener(), max_pixels=10**6, batch_size=3, shard_entries=4)


def test_a_mask_becomes_shares_of_the_latent_grid(tmp_path: Path) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:16, :8], mask[24:, 40:], mask[8:16, 40:44] = 255, 51, 255
    one, store = mask_request(tmp_path, mask, (32, 48)), ShardStore(tmp_path / "cache")
    assert masks(store, [one]) == {}
    expected = torch.zeros(1, 4, 6, dtype=torch.float16)
    expected[0, :2, 0], expected[0, 3, 5], expected[0, 1, 5] = 1.0, 51 / 255, 0.5
    assert store.read(one.key)["mask"].equal(expected)


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    mask = np.zeros((32, 64), np.uint8)
    mask[:, 40:] = 255
    one, store = mask_request(tmp_path, mask, (32, 32)), ShardStore(tmp_path / "cache")
    flipped = dataclasses.replace(one, key=bytes(16), crop=dataclasses.replace(one.crop, flipped=True))
    masks(store, [one, flipped])
    kept = store.read(one.key)["mask"]
    assert kept.equal(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float16).expand(1, 4, 4))
    assert store.read(flipped.key)["mask"].equal(kept.flip(2))


def test_a_mask_can_be_the_opacity_of_a_picture(tmp_path: Path) -> None:
    picture = np.full((16, 16, 4), 200, np.uint8)
    picture[:8, :, 3], picture[8:, :, 3] = 255, 0
    one, store = mask_request(tmp_path, picture, (16, 16), kind="alpha"), ShardStore(tmp_path / "cache")
    assert masks(store, [one]) == {}
    assert store.read(one.key)["mask"].tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_a_bad_mask_is_reported_by_the_digest_of_its_file(tmp_path: Path) -> None:
    one = mask_request(tmp_path, np.zeros((16, 16), np.uint8), (16, 16))
    path = Path(one.place.path)
    path.write_bytes(path.read_bytes()[:45])
    assert masks(ShardStore(tmp_path / "cache"), [one]) == {one.mask_digest: cache.FILE_CHANGED}
    damaged = dataclasses.replace(one, mask_digest=hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    (reason,) = masks(ShardStore(tmp_path / "cache"), [damaged]).values()
    assert "damaged" in reason


# Texts

TEXT_RECIPE = text_recipe(encoder_digest="toy texts", dtype="float16")


def encode_texts(store: ShardStore, captions: Iterable[str], encoder: ToyTexts, **changes: Any) -> dict[str, str]:
    settings: dict[str, Any] = {
        "recipe": TEXT_RECIPE, "num_chunks": chunks_of, "dtype": "float16", "batch_size": 3, "shard_entries": 8,
    }  # fmt: skip
    return build_texts(store, captions, lambda: encoder, **(settings | changes))


def test_captions_are_encoded_once_with_their_own_length(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    captions = ["", "a cat", "a" * 45, "a cat", "", "a dog", "a bird", "b" * 45]
    seen: list[tuple[int, int]] = []
    assert encode_texts(store, captions, encoder, on_progress=lambda done, total: seen.append((done, total))) == {}
    assert encoder.batches == [["a" * 45, "b" * 45], ["", "a cat", "a dog"], ["a bird"]]  # the longest first
    assert seen == [(2, 6), (5, 6), (6, 6)]
    for caption in captions:
        entry = store.read(text_keys([caption], TEXT_RECIPE).tobytes())
        assert entry["prompt_embeds"].shape == (77 * chunks_of(caption), 6)
        assert entry["pooled"].dtype == torch.float16
        assert entry["pooled"].tolist() == [len(caption)] * 4
    encode_texts(store, captions, encoder)
    assert len(encoder.batches) == 3


def test_changing_one_caption_encodes_one(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    encode_texts(store, ["a", "b", "c"], encoder)
    encode_texts(store, ["a", "B", "c"], encoder)
    assert encoder.batches[1:] == [["B"]]
    encode_texts(store, ["a", "B", "c"], encoder, recipe=text_recipe(encoder_digest="toy texts", dtype="float32"), dtype="float32")
    assert encoder.batches[2:] == [["a", "B", "c"]]


def test_captions_without_finite_numbers_are_tried_alone_and_reported(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    told: list[bytes] = []
    rejected = encode_texts(store, ["a", "nan", "company"], encoder, on_failure=lambda key, reason: told.append(key))
    assert rejected == {"nan": "the text encoders give numbers that are not finite for it"}
    assert told == [text_keys(["nan"], TEXT_RECIPE).tobytes()]
    assert encoder.batches == [["a", "nan", "company"], ["nan"], ["company"]]
    assert len(store) == 2
