"""What is damaged is found; what is wanted is never removed, whatever else is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint import storage
from aquatint.data import shards, upkeep
from aquatint.data.shard_index import INDEX_NAME
from aquatint.data.shards import CorruptEntry, ShardStore
from aquatint.data.upkeep import UNWANTED, gc, stat, verify
from aquatint.errors import LockedError, StorageError
from aquatint.tensor_file import TensorFile
from tests.data.test_shards import entries, flip, holds, key, keys_of, packed, same, shards_in


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test here could tell what is on the disk from what is in memory, and waiting for the disk is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def wanted(numbers: Iterable[int]) -> shards.Keys:
    return packed([key(number) for number in numbers])


def store_of(folder: Path, *parts: Iterable[int]) -> ShardStore:
    store = ShardStore(folder / "cache" / "latents")
    for numbers in parts:
        store.write(entries(*numbers))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


# verify


def test_a_sound_cache_stays_as_it_is(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(3), range(3, 10))
    seen: list[tuple[int, int]] = []
    report = verify(store, lambda done, total: seen.append((done, total)))
    assert report == upkeep.Report(shards=2, entries=10)
    assert seen in ([(3, 10), (10, 10)], [(7, 10), (10, 10)])
    assert holds(store, entries(*range(10)))
    assert (store.folder / INDEX_NAME).exists()
    assert verify(ShardStore(tmp_path / "none")) == upkeep.Report(0, 0)


@pytest.mark.parametrize("place", [0, 100, "mean", "pooled", "keys", "checksums", "end"])
def test_whatever_byte_is_damaged_its_shard_is_named_and_removed(tmp_path: Path, place: int | str) -> None:
    store = store_of(tmp_path, range(3), range(3, 6))
    store.save_index()
    path = store.folder / store._locate(key(4)).shard
    with TensorFile(path) as file:
        where = {"end": path.stat().st_size - 1, **{name: info.start + 3 for name, info in file.tensors.items()}}
    size = path.stat().st_size
    flip(path, place if isinstance(place, int) else where[place])
    report = verify(ShardStore(store.folder))
    assert (report.shards, report.entries, report.entries_lost, report.freed_bytes) == (2, 6, 3, size)
    assert list(report.removed) == [path.name]
    assert place != "mean" or report.removed[path.name] == f"entry {key(3).hex()}: its bytes are not those that were written"
    assert not path.exists()
    assert holds(ShardStore(store.folder), entries(0, 1, 2))
    assert verify(ShardStore(store.folder)).removed == {}


def test_a_shard_that_went_while_it_was_looked_at_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(3), range(3, 6))

    def remove(done: int, total: int) -> None:
        for path in shards_in(store.folder):
            path.unlink()

    assert list(verify(store, remove).removed.values()) == ["its file is gone"]


def test_a_damaged_shard_that_was_noticed_on_opening_is_named_too(tmp_path: Path) -> None:
    folder = store_of(tmp_path, range(3), range(3, 6)).folder
    path = shards_in(folder)[0]
    os.truncate(path, 10)
    report = verify(ShardStore(folder))
    assert list(report.removed) == [path.name]
    assert (report.shards, report.entries, report.entries_lost) == (2, 3, 0)


# stat


def test_what_is_in_a_store_is_counted(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(5), range(3, 10))
    store.write({key(100): {"mask": torch.zeros(3, 4, dtype=torch.uint8), "level": torch.tensor(1.0)}})
    sizes = {path.name: path.stat().st_size for path in shards_in(store.folder)}
    found = stat(store)
    assert (found.entries, found.shards, found.copies, found.bytes) == (11, 3, 2, sum(sizes.values()))
    assert found.kinds == {"mean F16 4x2x3, pooled F32 5": 12, "level F32 number, mask U8 3x4": 1}
    assert sizes[found.largest] == found.largest_bytes == max(sizes.values())
    assert found.bytes_per_entry == sum(sizes.values()) / 11


def test_an_empty_store_is_counted_too(tmp_path: Path) -> None:
    found = stat(ShardStore(tmp_path))
    assert found == upkeep.Stat(0, 0, 0, 0, {}, "missing", "", 0)
    assert found.bytes_per_entry == 0


def test_the_state_of_the_index_is_told(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(5))
    assert stat(store).index == "missing"
    store.save_index()
    assert stat(store).index == "current"
    store.write(entries(7))
    assert stat(store).index == "out of date"
    (store.folder / INDEX_NAME).write_bytes(b"")
    assert stat(store).index == "damaged"


# gc


def test_shards_that_nobody_wants_are_removed(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(4), range(4, 8), range(8, 12))
    size = shards_in(store.folder)[0].stat().st_size
    report = gc(store, wanted([*range(4), 8, 9, 10, 77]))
    assert (report.shards, report.entries, report.entries_lost, report.freed_bytes) == (3, 12, 4, size)
    assert list(report.removed.values()) == [UNWANTED]
    assert report.rewritten == {}
    assert holds(store, entries(*range(4), *range(8, 12)))
    assert holds(ShardStore(store.folder), entries(*range(4), *range(8, 12)))
    assert stat(store).index == "current"


def test_shards_of_which_little_is_wanted_are_packed_anew_together(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10), range(10, 20), range(20, 30), range(30, 40), range(40, 50))
    alive = [*range(10, 14), *range(20, 24), *range(30, 34), *range(40, 45)]
    before = {path.name for path in shards_in(store.folder)}
    report = gc(store, wanted(alive))
    assert holds(store, entries(*alive, *range(45, 50)))
    assert len(report.removed) == 1
    assert len(report.rewritten) == 3
    assert len(set(report.rewritten.values())) == 2  # 4 + 4 fit into a shard of 10, and another 4 do not
    assert {path.name for path in shards_in(store.folder)} - before == set(report.rewritten.values())
    assert report.entries_lost == 50 - len(alive) - 5
    assert gc(store, wanted(alive)) == upkeep.Report(shards=3, entries=22)


def test_only_entries_that_look_alike_are_packed_together(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(4))
    store.write({key(number): {"mask": torch.full((2,), number)} for number in range(10, 14)})
    report = gc(store, wanted([1, 11]))
    assert len(set(report.rewritten.values())) == 2
    assert keys_of(store) == {key(1), key(11)}
    assert store.read(key(11))["mask"].tolist() == [11, 11]


def test_a_dry_run_only_tells(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10), range(10, 20), range(20, 30))
    before = contents(tmp_path)
    with storage.shared_lock(tmp_path / "cache"):
        told = gc(store, wanted([*range(7), 12]), dry_run=True)
    assert contents(tmp_path) == before
    done = gc(store, wanted([*range(7), 12]))
    assert (told.removed, told.rewritten.keys()) == (done.removed, done.rewritten.keys())
    assert (told.entries_lost, told.freed_bytes) == (done.entries_lost, done.freed_bytes)
    assert done.entries_lost == 19
    freed = sum(map(len, before.values())) - sum(path.stat().st_size for path in shards_in(store.folder))
    assert abs(freed - done.freed_bytes) < 1000  # the new shard's header


def test_copies_are_removed_when_their_shard_is_thin(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10), range(10), range(5), range(5, 10))
    report = gc(store, wanted(range(10)), min_live_share=1.0)
    assert report.entries_lost == 0
    assert holds(store, entries(*range(10)))
    assert stat(store).copies == 0


def test_a_limit_of_0_packs_nothing_anew_and_others_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10))
    assert gc(store, wanted([3]), min_live_share=0.0) == upkeep.Report(1, 10)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            gc(store, wanted([3]), min_live_share=share)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=12), max_size=6),
    st.sets(st.integers(0, 40)),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_what_is_wanted_is_never_removed(
    tmp_path_factory: pytest.TempPathFactory, parts: list[set[int]], alive: set[int], share: float
) -> None:
    folder = tmp_path_factory.mktemp("gc")
    store = store_of(folder, *parts)
    everything = set().union(*parts)
    told = gc(store, wanted(alive), min_live_share=share, dry_run=True)
    report = gc(store, wanted(alive), min_live_share=share)
    assert (told.rewritten.keys(), told.entries_lost) == (report.rewritten.keys(), report.entries_lost)
    assert told.removed.keys() - report.removed.keys() <= set(report.rewritten.values())  # a copy of what was packed anew
    assert len(store) == len(everything) - report.entries_lost
    for left in (store, ShardStore(store.folder)):
        assert keys_of(left) <= {key(number) for number in everything}
        for number in everything & alive:
            assert same(left.read(key(number)), entries(number)[key(number)])
    assert store.discarded == {}
    if stat(store).copies == 0:
        assert gc(store, wanted(alive), min_live_share=share).removed == {}
    if share == 1.0:
        assert keys_of(store) == {key(number) for number in everything & alive}


def test_a_cache_in_use_is_not_touched(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10))
    before = contents(tmp_path)
    with storage.shared_lock(tmp_path / "cache"), pytest.raises(LockedError, match="cache is in use by another process"):
        gc(store, wanted([]))
    assert contents(tmp_path) == before
    gc(store, wanted([]))
    assert contents(tmp_path) == {}


def test_what_others_wrote_in_the_meantime_is_seen(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10))
    store_of(tmp_path, range(10, 20))
    assert gc(store, wanted(range(10, 20))).entries == 20
    assert holds(store, entries(*range(10, 20)))


class Crash(BaseException):
    pass


def crash_after(calls: int, real: Callable[..., object]) -> Callable[..., object]:
    left = iter(range(calls))

    def call(*args: object) -> object:
        if next(left, None) is None:
            raise Crash
        return real(*args)

    return call


@pytest.mark.parametrize("action", ["write_shard", "remove_file"])
@pytest.mark.parametrize("calls", range(6))
def test_a_crash_loses_nothing_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, calls: int) -> None:
    store = store_of(tmp_path, *(range(start, start + 10) for start in range(0, 50, 10)))
    alive = [*range(0, 8), *range(10, 18), 20, 21]
    with monkeypatch.context() as patch:
        module = upkeep if action == "write_shard" else shards
        patch.setattr(module, action, crash_after(calls, getattr(module, action)))
        try:
            gc(store, wanted(alive), min_live_share=0.9)
        except Crash:
            assert calls < (2 if action == "write_shard" else 5)
    for left in (store, ShardStore(store.folder)):
        for number in alive:
            assert same(left.read(key(number)), entries(number)[key(number)])


def test_a_damaged_shard_stops_it_before_anything_is_removed(tmp_path: Path) -> None:
    store = store_of(tmp_path, range(10), range(10, 20))
    path = store.folder / store._locate(key(3)).shard
    content = path.read_bytes()
    flip(path, content.index(bytes(entries(3)[key(3)]["pooled"].numpy())))
    with pytest.raises(CorruptEntry, match="run the same command again"):
        gc(store, wanted([3]))
    assert keys_of(ShardStore(store.folder)) == {key(number) for number in range(10, 20)}


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, range(10), range(10, 20))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            gc(store, wanted([3]))
    assert holds(ShardStore(store.folder), entries(*range(20)))
