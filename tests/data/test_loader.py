"""A batch is a function of its index, whoever reads it, and a worker's trouble is told by name."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aquatint.data.batch import Batch
from aquatint.data.captions import CaptionPolicy, draw_dropout, render
from aquatint.data.loader import BatchReader, Draws, Entries, NoiseKind, stream
from aquatint.data.sampler import Group, Order
from aquatint.data.samples import NO_KEY, Ragged, Samples, Words
from aquatint.data.shards import CorruptEntry, ShardStore
from aquatint.diffusion.noise import draw_noise, immiscible, pyramid
from aquatint.diffusion.timesteps import draw_timesteps
from aquatint.errors import AquatintError, StorageError
from aquatint.utils.seeds import generator

SHAPES = ((4, 6), (6, 4))  # of latents, one per bucket
COUNTS = (7, 5)
EMPTY = b"e" * 16
SEED, BATCH_SIZE, SCALING = 11, 4, 0.13025

# Python 3.12 and later say this when a process with threads forks, as DataLoader does by default
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def scaled(raw: torch.Tensor) -> torch.Tensor:
    return raw * SCALING


def latent_key(bucket: int, number: int, view: int) -> bytes:
    return bytes([bucket, view, number]).rjust(16, b"L")


def text_key(number: int, variant: int) -> bytes:
    return bytes([variant, number]).rjust(16, b"T")


def mask_key(bucket: int, number: int, view: int) -> bytes:
    """Every other picture has a mask."""
    return bytes([bucket, view, number]).rjust(16, b"M") if number % 2 else NO_KEY


def chunks(number: int) -> int:
    return 1 + number % 3


def keys(values: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)


def samples_of(counts: tuple[int, ...] = COUNTS, views: int = 4, variants: int = 2) -> Samples:
    rows = [(bucket, number) for bucket, count in enumerate(counts) for number in range(count)]
    return Samples(
        names=Words.of(f"{bucket}/{number}.png" for bucket, number in rows),
        bucket_starts=np.cumsum([0, *counts]),
        sources=np.array([number % 2 for _, number in rows], dtype=np.int16),
        latent_keys=keys(latent_key(*row, view) for row in rows for view in range(views)).reshape(-1, views, 16),
        time_ids=np.array(
            [[[3001 + number, 2001, view, 0, *(8 * side for side in SHAPES[bucket])] for view in range(views)] for bucket, number in rows],
            dtype=np.int32,
        ),
        loss_weights=np.array([1 + number for _, number in rows], dtype=np.float32),
        text_of=Ragged.of([variants] * len(rows)),
        text_keys=keys(text_key(number, variant) for _, number in rows for variant in range(variants)),
        text_weights=np.array([[0.75, 0.25] for _ in rows], dtype=np.float32).reshape(-1),
    )


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    return fill(tmp_path_factory.mktemp("cache"))


def fill(folder: Path) -> Entries:
    latents, texts, masks = (ShardStore(folder / name) for name in ("latents", "texts", "masks"))
    random = torch.Generator().manual_seed(0)
    for bucket, (shape, count) in enumerate(zip(SHAPES, COUNTS, strict=True)):
        places = [(bucket, number, view) for number in range(count) for view in range(4)]
        latents.write(
            {
                latent_key(*place): {
                    "moments": torch.cat([torch.randn(4, *shape, generator=random), torch.rand(4, *shape, generator=random)]).half(),
                }
                for place in places
            }
        )
        masks.write(
            {key: {"mask": torch.rand(1, *shape, generator=random).half()} for place in places if (key := mask_key(*place)) != NO_KEY}
        )
    captions = {text_key(number, variant): chunks(number) for number in range(max(COUNTS)) for variant in range(2)} | {EMPTY: 1}
    for length in (1, 2, 3):
        texts.write(
            {
                key: {
                    "prompt_embeds": torch.randn(77 * length, 8, generator=random).half(),
                    "pooled": torch.randn(5, generator=random).half(),
                }
                for key, own in captions.items()
                if own == length
            }
        )
    return Entries(latents, texts, masks, scaled, EMPTY)


def reader_of(entries: Entries, samples: Samples | None = None, **changes: Any) -> BatchReader:
    draws = {"seed": SEED, "samples_per_step": 8, "flip_prob": 0.3, "dropout_prob": 0.4, "dropout_zeros_share": 0.5}
    settings = {name: changes.pop(name) for name in list(changes) if name in Draws.__dataclass_fields__}
    order = Order(SEED, tuple((Group(count),) for count in COUNTS), BATCH_SIZE)
    return BatchReader(entries, samples or samples_of(), order, Draws(**{**draws, **settings}), **changes)


@pytest.fixture
def reader(entries: Entries) -> BatchReader:
    return reader_of(entries)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def all_same(found: Iterable[Batch], expected: Iterable[Batch]) -> bool:
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


def live_workers(before: list[Any]) -> list[Any]:
    return [process for process in multiprocessing.active_children() if process not in before]


# What is in a batch


def test_a_batch_holds_the_samples_of_the_order_at_their_positions(reader: BatchReader) -> None:
    for index in range(12):
        bucket, members = reader.order.batch(index)
        batch = reader.read(index)
        assert batch.names == tuple(f"{bucket}/{member}.png" for member in members)
        assert batch.positions == tuple(range(4 * index, 4 * index + 4))
        assert batch.latents.shape == batch.noise.shape == (4, 4, *SHAPES[bucket])


def test_formats_and_time_ids_are_exact(reader: BatchReader) -> None:
    batch = reader.read(0)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if isinstance(getattr(batch, field.name), torch.Tensor)}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "latents": torch.float32, "noise": torch.float32, "timesteps": torch.int64, "prompt_embeds": torch.float32,
        "pooled_prompt_embeds": torch.float32, "time_ids": torch.float32, "loss_weights": torch.float32,
    }  # fmt: skip
    assert all(float(row[0]) == 3001 + int(name[2]) for row, name in zip(batch.time_ids, batch.names, strict=True))
    assert batch.time_ids[:, 4:].tolist() == [[8 * side for side in batch.latents.shape[2:]]] * 4
    assert batch.loss_weights.tolist() == [1 + int(name[2]) for name in batch.names]
    assert batch.sources == tuple(int(name[2]) % 2 for name in batch.names)


def test_latents_are_drawn_around_their_mean_and_scaled(reader: BatchReader) -> None:
    batch = reader.read(3)
    bucket, members = reader.order.batch(3)
    eps = draw_noise(SEED, "latent", batch.positions, (4, *SHAPES[bucket]))
    for row, member in enumerate(members):
        view = int(batch.time_ids[row, 2])
        entry = reader.entries.latents.read(latent_key(bucket, member, view))
        mean, std = entry["moments"].float().chunk(2)
        expected = (mean + std * eps[row]) * SCALING
        assert torch.equal(batch.latents[row], expected)


def test_a_mask_comes_with_its_view_and_is_one_where_there_is_none(entries: Entries) -> None:
    rows = [(bucket, number) for bucket, count in enumerate(COUNTS) for number in range(count)]
    masked = replace(samples_of(), mask_keys=keys(mask_key(*row, view) for row in rows for view in range(4)).reshape(-1, 4, 16))
    reader = reader_of(replace(entries, mask_floor=0.25), masked)
    bucket, members = reader.order.batch(2)
    batch = reader.read(2)
    assert batch.masks is not None
    assert batch.masks.shape == (4, 1, *SHAPES[bucket])
    for row, member in enumerate(members):
        if member % 2:
            stored = entries.masks.read(mask_key(bucket, member, int(batch.time_ids[row, 2])))["mask"].float()
            assert torch.equal(batch.masks[row], stored.clamp(min=0.25))
        else:
            assert (batch.masks[row] == 1).all()
    assert reader_of(entries).read(2).masks is None


def test_noise_and_timesteps_are_those_of_the_positions(reader: BatchReader) -> None:
    batch = reader.read(5)
    assert torch.equal(batch.noise, draw_noise(SEED, "noise", range(20, 24), batch.noise.shape[1:]))
    assert torch.equal(batch.timesteps, draw_timesteps(SEED, range(20, 24), 8))


def test_timesteps_follow_the_density_of_the_bucket(entries: Entries) -> None:
    low, high = np.zeros((2, 1000))
    low[100], high[900] = 1, 1
    reader = reader_of(entries, densities=(low, high), spread="lattice")
    for index in range(6):
        assert set(reader.read(index).timesteps.tolist()) == {(100, 900)[reader.order.batch(index)[0]]}
    evenly = tuple(np.full((2, 1000), 0.001))
    found = reader_of(entries, densities=evenly, spread="independent").read(5).timesteps
    assert torch.equal(found, draw_timesteps(SEED, range(20, 24), 8, evenly[0], spread="independent"))


def test_kinds_of_noise_are_those_of_the_math_in_a_fixed_order(entries: Entries) -> None:
    """Whose noise it is, is settled first; then patterns, then shifts of whole channels, by the picture's own brightness."""
    plain = reader_of(entries).read(5)
    positions, shape = range(20, 24), plain.noise.shape[1:]
    kind = NoiseKind(offset=0.05, offset_slope=0.5, pyramid=0.3, pyramid_levels=3, perturbed=True, immiscible=True)
    batch = reader_of(entries, noise=kind).read(5)
    assert torch.equal(batch.latents, plain.latents)
    expected = pyramid(immiscible(plain.latents, plain.noise), SEED, positions, 0.3, levels=3)
    strength = (0.05 + 0.5 * plain.latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    assert torch.equal(batch.noise, expected + strength * draw_noise(SEED, "offset-noise", positions, (4, 1, 1)))
    assert torch.equal(batch.perturbation, draw_noise(SEED, "perturbation", positions, shape))
    assert plain.perturbation is None


def test_noise_cannot_be_assigned_in_a_part_of_a_batch(entries: Entries) -> None:
    with pytest.raises(ValueError, match="within a whole batch"):
        reader_of(entries, noise=NoiseKind(immiscible=True), rank=0, world=2)


def test_captions_are_padded_with_the_encoded_empty_text(entries: Entries) -> None:
    reader = reader_of(entries, dropout_prob=0.0)
    empty = reader.entries.texts.read(EMPTY)["prompt_embeds"].float()
    for index in range(6):
        batch = reader.read(index)
        _, members = reader.order.batch(index)
        longest = max(chunks(member) for member in members)
        assert batch.prompt_embeds.shape == (4, 77 * longest, 8)
        for row, member in enumerate(members):
            texts = [reader.entries.texts.read(text_key(member, variant)) for variant in range(2)]
            (text,) = [text for text in texts if torch.equal(text["pooled"].float(), batch.pooled_prompt_embeds[row])]
            parts = [text["prompt_embeds"].float()] + [empty] * (longest - chunks(member))
            assert torch.equal(batch.prompt_embeds[row], torch.cat(parts))


def test_a_dropped_caption_is_zeros_or_the_encoded_empty_text_in_both_embeddings(reader: BatchReader) -> None:
    empty = reader.entries.texts.read(EMPTY)
    kinds = set()
    for index in range(12):
        batch = reader.read(index)
        for row, position in enumerate(batch.positions):
            kind = draw_dropout(SEED, position, prob=0.4, zeros_share=0.5)
            kinds.add(kind)
            embeds, pooled = batch.prompt_embeds[row], batch.pooled_prompt_embeds[row]
            assert (not embeds.any()) == (not pooled.any()) == (kind == "zeros")
            if kind == "empty":
                assert torch.equal(pooled, empty["pooled"].float())
                assert torch.equal(embeds, empty["prompt_embeds"].float().repeat(len(embeds) // 77, 1))
            assert float(batch.time_ids[row, 0]) >= 3001
    assert kinds == {"keep", "zeros", "empty"}


def test_a_batch_without_any_caption_has_one_chunk(entries: Entries) -> None:
    for share in (0.0, 1.0):
        batch = reader_of(entries, dropout_prob=1.0, dropout_zeros_share=share).read(0)
        assert batch.prompt_embeds.shape == (4, 77, 8)
        assert batch.prompt_embeds.any() == (share == 0)


def test_views_captions_and_flips_are_drawn_evenly_and_each_on_its_own(entries: Entries) -> None:
    reader = reader_of(entries, flip_prob=0.25)
    drawn = [reader._choose_view(position) for position in range(4000)]
    shares = [drawn.count(view) / 4000 for view in range(4)]
    assert shares == pytest.approx([0.375, 0.125, 0.375, 0.125], abs=0.03)
    unflipped = reader_of(entries, flip_prob=0.0)
    drawn = [unflipped._choose_view(position) for position in range(4000)]
    assert [drawn.count(view) / 4000 for view in range(4)] == pytest.approx([0.25] * 4, abs=0.03)
    texts = [reader_of(entries, dropout_prob=0.0)._choose(3, position).text for position in range(2000)]
    assert set(texts) == {6, 7}
    assert texts.count(6) == pytest.approx(1500, abs=100), "texts are drawn by their weights"


def test_what_is_drawn_for_a_sample_does_not_depend_on_the_batch_size(entries: Entries) -> None:
    five = samples_of((5,))
    alike = replace(five, latent_keys=five.latent_keys[[0] * 5], time_ids=five.time_ids[[0] * 5], text_keys=five.text_keys[[0, 1] * 5])
    small, large = (BatchReader(entries, alike, Order(SEED, ((Group(5),),), batch_size), Draws(SEED, 8)) for batch_size in (1, 4))
    singles = [small.read(index) for index in range(4, 8)]
    four = large.read(1)
    for name in ("latents", "noise", "timesteps", "pooled_prompt_embeds", "time_ids"):
        assert torch.equal(torch.cat([getattr(single, name) for single in singles]), getattr(four, name)), name


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_what_one_alone_would_read(entries: Entries, world: int) -> None:
    whole = reader_of(entries, dropout_prob=0.0)
    ranks = [reader_of(entries, dropout_prob=0.0, rank=rank, world=world) for rank in range(world)]
    for index in range(8):
        parts = [rank.read(index) for rank in ranks]
        expected = whole.read(index)
        assert sum((part.names for part in parts), ()) == expected.names
        assert sum((part.positions for part in parts), ()) == expected.positions
        for name in ("latents", "noise", "timesteps", "pooled_prompt_embeds", "time_ids", "loss_weights"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name)), name


def test_a_batch_that_ranks_cannot_share_alike_is_refused(entries: Entries) -> None:
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared by 3"):
        reader_of(entries, world=3)


def test_captions_that_are_encoded_as_they_come_are_rendered_anew_at_every_position(entries: Entries) -> None:
    samples = samples_of()
    policies = (CaptionPolicy(style="tags", shuffle=True, trigger="ohwx"), CaptionPolicy(style="tags", shuffle=True))
    online = replace(
        samples, text_keys=np.empty((0, 16), np.uint8), captions=Words.of(["a, b, c, d, e", "f, g"] * len(samples)),
    )  # fmt: skip
    reader = reader_of(entries, online, policies=policies)
    seen = set()
    for index in range(12):
        batch = reader.read(index)
        assert batch.prompt_embeds is None
        assert batch.pooled_prompt_embeds is None
        assert batch.captions is not None
        for caption, position, source in zip(batch.captions, batch.positions, batch.sources, strict=True):
            kind = draw_dropout(SEED, position, prob=0.4, zeros_share=0.5)
            rendered = render(["a, b, c, d, e", "f, g"], policies[source], generator(SEED, "caption", position), drop_probs=None)
            assert caption == {"keep": rendered, "zeros": None, "empty": ""}[kind]
            assert kind != "keep" or rendered.startswith("ohwx") == (source == 0)
            seen.add(caption)
    assert len(seen) > 12


def test_pictures_are_read_for_validation_as_they_are(entries: Entries) -> None:
    samples = samples_of()
    batch = entries.fixed(samples, [9, 7])
    means = torch.stack([entries.latents.read(latent_key(1, number, 0))["moments"].float()[:4] for number in (2, 0)])
    assert torch.equal(batch.latents, means * SCALING)
    assert not batch.noise.any()
    assert batch.timesteps.tolist() == [0, 0]
    assert batch.names == ("1/2.png", "1/0.png")
    assert torch.equal(batch.pooled_prompt_embeds[1], entries.texts.read(text_key(0, 0))["pooled"].float())


def test_buckets_that_do_not_fit_the_order_are_refused(entries: Entries) -> None:
    with pytest.raises(ValueError, match="the order is for other buckets"):
        BatchReader(entries, samples_of(), Order(0, ((Group(2),),), 1), Draws(0, 1))


def test_golden_draws(reader: BatchReader) -> None:
    batch = reader.read(7)
    assert batch.names == ("0/5.png", "0/1.png", "0/2.png", "0/1.png")  # a lap ends inside it
    assert batch.time_ids[:, 2].tolist() == [0, 1, 2, 0]
    assert batch.timesteps.tolist() == [763, 738, 994, 401]
    assert batch.pooled_prompt_embeds.any(dim=1).tolist() == [False, True, True, True]
    drawn = [generator(SEED, stream, 5).random() for stream in ("view", "flip", "text-variant")]
    assert drawn == [0.14016963700402585, 0.8261661278955559, 0.8946893397886638]


# Streams


@pytest.mark.parametrize(("workers", "start_method"), [(0, None), (1, "fork"), (4, "fork"), (2, "spawn")])
def test_any_number_and_kind_of_workers_gives_the_same_batches(reader: BatchReader, workers: int, start_method: str | None) -> None:
    expected = [reader.read(index) for index in range(2, 11)]
    state = torch.get_rng_state()
    with contextlib.closing(stream(reader, 2, 11, workers=workers, prefetch=2, pin=False, start_method=start_method)) as batches:
        assert all_same(batches, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_that_starts_anywhere_goes_on_as_if_it_had_started_at_the_beginning(reader: BatchReader) -> None:
    whole = list(stream(reader, 0, 8, workers=0, prefetch=1, pin=False))
    for start in range(8):
        assert all_same(stream(reader, start, 8, workers=0, prefetch=1, pin=False), whole[start:])
    assert list(stream(reader, 8, 8, workers=2, prefetch=1, pin=False)) == []


def test_closing_a_stream_ends_its_workers(reader: BatchReader) -> None:
    before = multiprocessing.active_children()
    batches = stream(reader, 0, 1000, workers=2, prefetch=2, pin=False, start_method="fork")
    next(batches)
    assert len(multiprocessing.active_children()) == len(before) + 2
    batches.close()
    assert multiprocessing.active_children() == before


# Trouble


def damage(folder: Path) -> None:
    for path in (folder / "latents").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    entries = fill(tmp_path)
    damage(tmp_path)
    reader = reader_of(entries)
    with pytest.raises(CorruptEntry, match=r"the cached entry .* is damaged") as caught:
        list(stream(reader, 0, 12, workers=workers, prefetch=1, pin=False, start_method="fork" if workers else None))
    assert isinstance(caught.value, StorageError)
    assert "run the same command again" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_of_ours_in_a_worker_is_named_with_the_batch(entries: Entries, workers: int) -> None:
    reader, before = reader_of(replace(entries, empty_text_key=b"\xff" * 16)), multiprocessing.active_children()
    with pytest.raises(AquatintError, match=r"reading batch 0 failed: .*ffff") as caught:
        list(stream(reader, 0, 12, workers=workers, prefetch=1, pin=False, start_method="fork" if workers else None))
    assert "report" in caught.value.hint
    assert live_workers(before) == []


class Odd(Exception):
    """Cannot be sent from one process to another: whoever unpickles it does not know what it needs."""

    def __init__(self, *, needed: object) -> None:
        super().__init__("something odd", needed)


class Hopeless(BatchReader):
    def read(self, batch_index: int) -> Batch:
        raise Odd(needed=lambda: None)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_an_error_that_cannot_be_sent_is_named_within_ten_seconds(reader: BatchReader, start_method: str) -> None:
    reader.__class__ = Hopeless
    before, start = multiprocessing.active_children(), time.monotonic()
    with pytest.raises(AquatintError, match=r"reading batch 0 failed: .*(Odd|odd)") as caught:
        list(stream(reader, 0, 12, workers=1, prefetch=1, pin=False, start_method=start_method))
    assert "report" in caught.value.hint
    assert time.monotonic() - start < 10
    assert live_workers(before) == []


def test_a_worker_that_was_killed_between_two_batches_is_named(reader: BatchReader) -> None:
    before = multiprocessing.active_children()
    batches = stream(reader, 0, 1000, workers=2, prefetch=2, pin=False, start_method="fork")
    next(batches)
    victim = live_workers(before)[1]
    victim.kill()
    victim.join()
    start = time.monotonic()
    with pytest.raises(AquatintError, match=r"a process that reads batches has died \(signal 9, Killed\)") as caught:
        list(batches)
    assert time.monotonic() - start < 4
    assert "loader.workers" in caught.value.hint


class Doomed(BatchReader):
    """Is killed at batch 3, as the kernel does it when memory runs out."""

    def read(self, batch_index: int) -> Batch:
        if batch_index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(batch_index)


def test_a_worker_that_is_killed_while_its_batch_is_awaited_is_named_within_ten_seconds(reader: BatchReader) -> None:
    reader.__class__ = Doomed
    start = time.monotonic()
    with pytest.raises(AquatintError, match=r"a process that reads batches has died \(signal 9, Killed\)"):
        list(stream(reader, 0, 1000, workers=1, prefetch=1, pin=False, start_method="fork"))
    assert time.monotonic() - start < 10


def test_a_dead_worker_raises_where_batches_are_taken_and_nowhere_else(reader: BatchReader) -> None:
    before = multiprocessing.active_children()
    with contextlib.closing(stream(reader, 0, 1000, workers=1, prefetch=1, pin=False, start_method="fork")) as batches:
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # DataLoader's own would raise from the midst of a step
        (worker,) = live_workers(before)
        worker.kill()
        worker.join()
        assert sum(range(100_000)) == 4_999_950_000  # a training step, as it were
        with pytest.raises(AquatintError, match="has died"):
            next(batches)


def test_ctrl_c_is_left_to_the_parent(reader: BatchReader) -> None:
    before = multiprocessing.active_children()
    with contextlib.closing(stream(reader, 0, 1000, workers=1, prefetch=1, pin=False, start_method="fork")) as batches:
        next(batches)
        (worker,) = live_workers(before)
        for number in (signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert all(same(next(batches), reader.read(index)) for index in range(1, 6))
        assert worker.is_alive()
