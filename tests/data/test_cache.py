"""What is missing is encoded once, what is there is left alone, and what is no number is never stored."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import random
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from aquatint.data import cache, crop
from aquatint.data.cache import LatentRequest, build_latents, build_texts, latent_key, text_key
from aquatint.data.image import load_image, save_png
from aquatint.data.shards import CorruptEntry, ShardStore
from aquatint.errors import StorageError

SHAPES = ((16, 24), (24, 16), (16, 16))
BAD_RED = 201  # a picture of this colour has no finite latent


class ToyEncoder:
    """Means of 8 x 8 pixels, and how bright each is; pictures of one red give NaN, and those of another only in company."""

    digest = "toy"

    def __init__(self, nan: int | None = None, nan_in_company: int | None = None) -> None:
        self.nan, self.nan_in_company = nan, nan_in_company
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
        self.batches.append(tuple(images.shape))
        mean = avg_pool2d(images, 8)
        encoded = torch.cat([mean, mean[:, :1], mean.abs(), mean[:, :1].abs()], dim=1)
        for row, image in enumerate(images):
            red = round((float(image[0, 0, 0]) + 1) * 127.5)
            if red == self.nan or (red == self.nan_in_company and len(images) > 1):
                encoded[row, 5, 0, 0] = torch.nan
        return encoded


class ToyTexts:
    digest = "toy texts"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.batches.append(list(captions))
        return [self.one(caption, alone=len(captions) == 1) for caption in captions]

    def one(self, caption: str, *, alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.nan if "nan" in caption else torch.inf if "company" in caption and not alone else float(len(caption))
        return torch.full((77 * (1 + len(caption) // 20), 6), float(len(caption))), torch.full((4,), value)


def picture(folder: Path, red: int, size_hw: tuple[int, int] = (30, 40)) -> tuple[Path, str]:
    """A file of one colour, and its digest."""
    path = folder / f"{red}-{size_hw[0]}.png"
    if not path.exists():
        save_png(path, np.full((*size_hw, 3), (red, 10, 20), dtype=np.uint8))
    return path, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def request(folder: Path, red: int, target_hw: tuple[int, int] = (16, 24), *, flipped: bool = False) -> LatentRequest:
    path, digest = picture(folder, red)
    cut = crop.fit((30, 40), target_hw, flipped=flipped)
    key = latent_key(digest, cut, alpha_color="#ffffff", encoder_digest="toy", precision="float32", dtype="float16")
    return LatentRequest(key, path, digest, cut)


def build(store: ShardStore, requests: Iterable[LatentRequest], encoder: ToyEncoder, **changes: Any) -> dict[str, str]:
    settings: dict[str, Any] = {
        "alpha_color": "#ffffff", "max_pixels": 10**6, "dtype": "float16", "batch_size": 3, "shard_entries": 4, "num_threads": 2,
    }  # fmt: skip
    return build_latents(store, requests, encoder, **(settings | changes))


# Keys


def test_a_latents_key_changes_with_everything_that_it_depends_on() -> None:
    cut = crop.fit((300, 200), (64, 64), position=(0.5, 0.5))
    given = {"alpha_color": "#ffffff", "encoder_digest": "vae", "precision": "float32", "dtype": "float16"}
    cuts = [dataclasses.replace(cut, **{field.name: value}) for field, value in zip(
        dataclasses.fields(cut), [(301, 200), (97, 64), 1, 1, (32, 64), True], strict=True
    )]  # fmt: skip
    others = [given | {name: value} for name, value in
              [("alpha_color", "#fffffe"), ("encoder_digest", "other"), ("precision", "bfloat16"), ("dtype", "float32")]]  # fmt: skip
    keys = {latent_key("a", cut, **given), latent_key("b", cut, **given)}
    keys |= {latent_key("a", other, **given) for other in cuts} | {latent_key("a", cut, **other) for other in others}
    assert len(keys) == 2 + 6 + 4
    assert all(len(key) == 32 for key in keys)


def test_a_latents_key_changes_with_the_way_pictures_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"alpha_color": "#ffffff", "encoder_digest": "vae", "precision": "float32", "dtype": "float16"}
    before = latent_key("a", crop.fit((300, 200), (64, 64)), **given)
    monkeypatch.setattr(cache, "PICTURE_VERSION", cache.PICTURE_VERSION + 1)
    assert latent_key("a", crop.fit((300, 200), (64, 64)), **given) != before


def test_the_same_request_has_the_same_key_whatever_kind_of_integers_it_holds() -> None:
    given = {"alpha_color": "#ABCDEF", "encoder_digest": "vae", "precision": "float32", "dtype": "float16"}
    plain = crop.fit((300, 200), (64, 64))
    numpy = dataclasses.replace(plain, target_hw=tuple(np.array([64, 64])), top=np.int64(plain.top))
    assert latent_key("a", plain, **given) == latent_key("a", numpy, **given | {"alpha_color": "#abcdef"})


def test_a_texts_key_changes_with_the_text_the_encoders_and_the_format() -> None:
    keys = {
        text_key(caption, encoder_digest=digest, dtype=dtype)
        for caption in ("", " ", "a", "ä", "a\n")
        for digest in ("x", "y")
        for dtype in ("float16", "float32")
    }
    assert len(keys) == 20
    assert text_key("a", encoder_digest="x", dtype="float16") == text_key("a", encoder_digest="x", dtype="float16")


# Latents


def test_what_is_missing_is_encoded_and_can_be_read(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red, shape) for red in range(0, 250, 50) for shape in SHAPES]
    assert build(store, requests, encoder) == {}
    assert store.keys() == {one.key for one in requests}
    for one in requests:
        pixels = crop.apply(load_image(one.path, "#ffffff", 10**6), one.crop)
        image = torch.tensor(pixels.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
        expected = ToyEncoder().encode(image).half()[0]
        assert store.read(one.key)["mean"].equal(expected[:4])
        assert store.read(one.key)["std"].equal(expected[4:])


def test_a_hit_is_not_encoded_again(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red) for red in range(4)]
    build(store, requests, encoder)
    before, files = len(encoder.batches), sorted(store.folder.iterdir())
    assert build(ShardStore(store.folder), requests, encoder) == {}
    assert len(encoder.batches) == before
    assert sorted(store.folder.iterdir()) == files
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


def test_a_picture_is_decoded_once_for_all_its_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def load(path: Path, *rest: Any) -> Any:
        decoded.append(path)
        return load_image(path, *rest)

    monkeypatch.setattr(cache, "load_image", load)
    requests = [request(tmp_path, red, flipped=flipped) for red in (1, 2) for flipped in (False, True)]
    store = ShardStore(tmp_path / "cache")
    build(store, requests, ToyEncoder(), batch_size=1)
    assert len(store.keys()) == 4
    assert sorted(decoded) == [picture(tmp_path, red)[0] for red in (1, 2)]


def test_pictures_are_prepared_only_so_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    ahead: list[int] = []

    class Slow(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            ahead.append(len(decoded) - sum(batch[0] for batch in self.batches))
            return super().encode(images)

    monkeypatch.setattr(cache, "load_image", lambda path, *rest: (decoded.append(path), load_image(path, *rest))[1])
    build(ShardStore(tmp_path / "cache"), [request(tmp_path, red) for red in range(40)], Slow(), batch_size=2)
    assert len(ahead) == 20
    assert max(ahead) <= 2 + 2 + 2 + 1  # the batch, as many as a batch, the threads, and the one that was just asked for


def test_progress_counts_what_was_missing(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    build(store, [request(tmp_path, 0)], ToyEncoder())
    seen: list[tuple[int, int]] = []
    build(store, [request(tmp_path, red) for red in range(6)], ToyEncoder(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 5), (5, 5)]


# Pictures that cannot be used


def test_bad_pictures_are_reported_by_digest_and_the_rest_is_stored(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in range(6)]
    damaged, changed = requests[1], requests[4]
    damaged.path.write_bytes(damaged.path.read_bytes()[:60])
    save_png(changed.path, np.full((30, 40, 3), 77, dtype=np.uint8))
    rejected = build(store, requests, ToyEncoder())
    assert rejected.keys() == {damaged.picture_digest, changed.picture_digest}
    assert rejected[damaged.picture_digest]
    assert rejected[changed.picture_digest] == cache.FILE_CHANGED
    assert store.keys() == {one.key for one in requests} - {damaged.key, changed.key}


def test_a_picture_without_finite_numbers_is_reported_and_never_stored(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in (1, BAD_RED, 2, 3)]
    rejected = build(store, requests, ToyEncoder(nan=BAD_RED))
    assert rejected == {requests[1].picture_digest: "the autoencoder gives numbers that are not finite for it"}
    assert store.keys() == {requests[index].key for index in (0, 2, 3)}


def test_what_is_not_finite_is_tried_again_alone(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder(nan_in_company=BAD_RED)
    requests = [request(tmp_path, red) for red in (1, BAD_RED, 2)]
    assert build(store, requests, encoder) == {}
    assert encoder.batches == [(3, 3, 16, 24), (1, 3, 16, 24)]
    assert all(bool(tensor.isfinite().all()) for one in requests for tensor in store.read(one.key).values())


def test_numbers_too_large_for_the_storage_format_are_not_stored(tmp_path: Path) -> None:
    class Large(ToyEncoder):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode(images) * 1e6

    half, single = ShardStore(tmp_path / "half"), ShardStore(tmp_path / "single")
    assert len(build(half, [request(tmp_path, 1)], Large())) == 1
    assert half.keys() == set()
    assert build(single, [request(tmp_path, 1)], Large(), dtype="float32") == {}


def test_a_disk_that_fails_stops_the_build_and_names_the_file(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in range(5)]
    requests[4].path.unlink()
    with pytest.raises(StorageError, match=f"could not read {requests[4].path}"):
        build(store, requests, ToyEncoder())
    assert store.keys() == {one.key for one in requests[:3]}  # the whole batches before it


# Interruptions


def interrupt_at(batch: int) -> Callable[[int, int], None]:
    calls = iter(range(1000))

    def progress(done: int, total: int) -> None:
        if next(calls) == batch:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_loses_nothing_that_was_encoded(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    requests = [request(tmp_path, red) for red in range(8)]
    with pytest.raises(KeyboardInterrupt):
        build(store, requests, ToyEncoder(), batch_size=2, shard_entries=100, on_progress=interrupt_at(2))
    assert store.keys() == {one.key for one in requests[:6]}


def test_a_full_disk_is_reported_once_and_what_was_published_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path / "cache")
    attempts: list[int] = []
    write = store.write

    def full(entries: Any) -> None:
        attempts.append(len(entries))
        if len(attempts) > 1:
            raise StorageError("the disk is full", hint="free some space")
        write(entries)

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        build(store, [request(tmp_path, red) for red in range(9)], ToyEncoder(), shard_entries=3)
    assert [count for count in attempts if count] == [3, 3]
    assert len(store.keys()) == 3


def test_a_damaged_entry_is_made_again_with_its_shard_and_nothing_else(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path / "cache"), ToyEncoder()
    requests = [request(tmp_path, red) for red in range(6)]
    build(store, requests, encoder, shard_entries=3)
    path = store.folder / store._shard_of[requests[4].key]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptEntry):
        [store.read(one.key) for one in requests]
    encoder.batches.clear()
    build(ShardStore(store.folder), requests, encoder, shard_entries=3)
    assert encoder.batches == [(3, 3, 16, 24)]
    assert path.exists()
    assert all(ShardStore(store.folder).read(one.key) for one in requests)


def build_telling(folder: Path, requests: list[LatentRequest], pipe: Connection) -> None:
    torch.set_num_threads(1)
    build(ShardStore(folder), requests, ToyEncoder(), on_progress=lambda done, total: pipe.send(done))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_and_started_again_makes_the_same_files_as_without(tmp_path: Path) -> None:
    requests = [request(tmp_path, red, shape) for red in range(20) for shape in SHAPES]
    clean = ShardStore(tmp_path / "clean")
    build(clean, requests, ToyEncoder())
    folder, dice = tmp_path / "killed", random.Random(1)
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        receiver, sender = fork.Pipe(duplex=False)
        writer = fork.Process(target=build_telling, args=(folder, requests, sender))
        writer.start()
        sender.close()
        for _ in range(dice.randint(1, 3)):
            assert receiver.poll(10)
            receiver.recv()
        writer.join(dice.uniform(0, 0.002))
        writer.kill()
        writer.join()
        receiver.close()
    before = ShardStore(folder).keys()
    encoder = ToyEncoder()
    build(ShardStore(folder), requests, encoder)
    assert 0 < len(before) < len(requests)
    assert sum(batch[0] for batch in encoder.batches) == len(requests) - len(before)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in clean.folder.iterdir()
    }


# Texts


def test_captions_are_encoded_once_with_their_own_length(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    captions = ["", "a cat", "a" * 45, "a cat", "", "a dog"]
    seen: list[tuple[int, int]] = []
    rejected = build_texts(
        store, captions, encoder, dtype="float16", batch_size=3, shard_entries=2, on_progress=lambda done, total: seen.append((done, total))
    )
    assert rejected == {}
    assert encoder.batches == [["", "a cat", "a" * 45], ["a dog"]]
    assert seen == [(3, 4), (4, 4)]
    for caption in captions:
        entry = store.read(text_key(caption, encoder_digest="toy texts", dtype="float16"))
        assert entry["prompt_embeds"].shape == (77 * (1 + len(caption) // 20), 6)
        assert entry["pooled"].dtype == torch.float16
        assert entry["pooled"].tolist() == [len(caption)] * 4
    build_texts(store, captions, encoder, dtype="float16", batch_size=3, shard_entries=2)
    assert len(encoder.batches) == 2


def test_changing_one_caption_encodes_one(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    build_texts(store, ["a", "b", "c"], encoder, dtype="float32", batch_size=8, shard_entries=8)
    build_texts(store, ["a", "B", "c"], encoder, dtype="float32", batch_size=8, shard_entries=8)
    assert encoder.batches[1:] == [["B"]]
    build_texts(store, ["a", "B", "c"], encoder, dtype="float16", batch_size=8, shard_entries=8)
    assert encoder.batches[2:] == [["a", "B", "c"]]


def test_captions_without_finite_numbers_are_tried_alone_and_reported(tmp_path: Path) -> None:
    store, encoder = ShardStore(tmp_path), ToyTexts()
    rejected = build_texts(store, ["a", "nan", "company"], encoder, dtype="float32", batch_size=8, shard_entries=8)
    assert rejected == {"nan": "the text encoders give numbers that are not finite for it"}
    assert encoder.batches == [["a", "nan", "company"], ["nan"], ["company"]]
    assert len(store.keys()) == 2
