"""Entries come back byte for byte, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data import shards
from aquatint.data.shard_index import INDEX_NAME, Field, Layout, Location, ShardIndex, save_index
from aquatint.data.shards import CorruptEntry, Keys, ShardStore
from aquatint.errors import StorageError, UsageError
from aquatint.tensor_file import DTYPES, as_bytes, write_tensors

Entries = Mapping[bytes, Mapping[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test here could tell what is on the disk from what is in memory, and waiting for the disk is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def packed(names: Iterable[bytes]) -> Keys:
    return np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)


def entries(*numbers: int) -> dict[bytes, dict[str, torch.Tensor]]:
    """An entry per number, a function of the number alone."""
    made = {}
    for number in numbers:
        values = torch.arange(24.0) + 100 * number
        made[key(number)] = {"mean": values.reshape(4, 2, 3).half(), "pooled": values[:5]}
    return made


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


def keys_of(store: ShardStore) -> set[bytes]:
    keys = store.keys()
    assert [one.tobytes() for one in keys] == sorted({one.tobytes() for one in keys})
    return {one.tobytes() for one in keys}


def holds(store: ShardStore, expected: Entries) -> bool:
    return (
        keys_of(store) == expected.keys()
        and len(store) == len(expected)
        and all(same(store.read(name), entry) for name, entry in expected.items())
    )


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != INDEX_NAME)


def the_shard(folder: Path) -> Path:
    (path,) = shards_in(folder)
    return path


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_entries_read_back_in_their_own_format(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    assert len(store) == 0
    assert not store.folder.exists()
    assert store.write(entries(1, 2, 3)) == the_shard(store.folder).name
    store.write(entries(4))
    assert store.write({}) is None
    assert key(4) in store
    assert key(5) not in store
    assert holds(store, entries(1, 2, 3, 4))
    assert holds(ShardStore(tmp_path / "cache"), entries(1, 2, 3, 4))
    assert len(list(store.folder.iterdir())) == 2


FORMATS = [getattr(torch, torch_name) for torch_name, _ in DTYPES.values()]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 2)], ids=str)
def test_every_format_and_shape_can_be_kept(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    store = ShardStore(tmp_path)
    made = {key(number): {"mask": torch.arange(prod(shape)).reshape(shape).add(number).to(dtype)} for number in range(3)}
    store.write(made)
    for reader in (store, ShardStore(tmp_path, memory_bytes=1000)):
        for _ in range(2):
            found = reader.read_batch([key(2), key(0)])["mask"]
            assert (found.dtype, found.shape) == (dtype, (2, *shape))
            for number, tensor in ((2, found[0]), (0, found[1]), (1, reader.read(key(1))["mask"])):
                assert (tensor.dtype, tensor.shape) == (dtype, shape)
                assert bytes(as_bytes(tensor)) == bytes(as_bytes(made[key(number)]["mask"]))


def test_any_tool_can_open_a_shard(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(2, 1))
    with safetensors.safe_open(the_shard(tmp_path), "pt") as file:
        assert set(file.keys()) == {"mean", "pooled", "keys", "checksums"}
        assert file.metadata() == {"aquatint.cache_format": "2"}
        assert file.get_tensor("keys").numpy().tobytes() == key(1) + key(2)
        assert file.get_tensor("checksums").shape == (2, 16)
        assert torch.equal(file.get_tensor("mean")[1], entries(2)[key(2)]["mean"])


def test_views_of_a_batch_are_written_as_they_look(tmp_path: Path) -> None:
    batch = torch.arange(48.0).reshape(2, 8, 3).transpose(1, 2)
    ShardStore(tmp_path).write({key(1): {"mean": batch[1, :, ::2]}})
    assert torch.equal(ShardStore(tmp_path).read(key(1))["mean"], batch[1, :, ::2])


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, memory_bytes=1000)
    store.write(entries(1))
    for _ in range(3):
        for tensor in store.read(key(1)).values():
            tensor.zero_()
        for tensor in store.read_batch([key(1)]).values():
            tensor.zero_()
    assert holds(store, entries(1))


@pytest.mark.parametrize("name", [key(1), b"", b"short", key(1) * 2])
def test_an_unknown_key_is_a_key_error(tmp_path: Path, name: bytes) -> None:
    store = ShardStore(tmp_path)
    for _ in range(2):
        assert name not in store
        for read in (store.read, lambda name: store.read_batch([name])):
            with pytest.raises(KeyError) as caught:
                read(name)
            assert caught.value.args == (name.hex(),)
        store.write(entries(2))


@pytest.mark.parametrize("name", [b"", b"short", key(1) * 2])
def test_only_keys_of_16_bytes_are_written(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(ValueError, match="instead of 16"):
        ShardStore(tmp_path).write({name: {"mean": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["", "keys", "checksums", "Mean", "a/b", "__metadata__ "])
def test_only_names_of_fields_are_written(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match="no names of fields"):
        ShardStore(tmp_path).write({key(1): {field: torch.zeros(1)}})
    with pytest.raises(ValueError, match="no names of fields"):
        ShardStore(tmp_path).write({key(1): {}})
    assert list(tmp_path.iterdir()) == []


THREE = torch.zeros(3)
OTHERS = [{"mean": torch.zeros(2)}, {"mean": THREE.half()}, {"std": THREE}, {"mean": THREE, "std": THREE}]


@pytest.mark.parametrize("other", OTHERS)
def test_only_entries_that_look_alike_share_a_shard_or_a_batch(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    store = ShardStore(tmp_path)
    with pytest.raises(ValueError, match="look alike"):
        store.write({key(1): {"mean": torch.zeros(3)}, key(2): other})
    assert list(tmp_path.iterdir()) == []
    store.write({key(1): {"mean": torch.zeros(3)}})
    store.write({key(2): other})
    with pytest.raises(ValueError, match="look alike"):
        store.read_batch([key(1), key(2)])


def test_the_same_entries_give_the_same_file_whoever_writes_them_in_whatever_order(tmp_path: Path) -> None:
    ShardStore(tmp_path / "a").write(entries(1, 2, 3))
    for numbers in ((3, 2, 1), (2, 1, 3)):
        ShardStore(tmp_path / "b").write(entries(*numbers))
    assert the_shard(tmp_path / "a").name == the_shard(tmp_path / "b").name
    assert the_shard(tmp_path / "a").read_bytes() == the_shard(tmp_path / "b").read_bytes()


def test_the_name_of_a_shard_is_the_same_today_as_it_was(tmp_path: Path) -> None:
    assert ShardStore(tmp_path).write(entries(1, 2)) == "b70e22073391269135721a61574401c0.safetensors"
    assert xxhash.xxh3_128_hexdigest(the_shard(tmp_path).read_bytes()) == "f3deba27a90c75b1d393ad90d821c139"


def test_a_batch_is_its_entries_in_the_order_asked_for(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    for start in range(0, 20, 5):
        store.write(entries(*range(start, start + 5)))
    dice = random.Random(0)
    for size in (1, 2, 7, 30):
        wanted = [dice.randrange(20) for _ in range(size)]
        batch = store.read_batch([key(number) for number in wanted])
        assert all(column.is_contiguous() and len(column) == size for column in batch.values())
        for place, number in enumerate(wanted):
            assert same({name: column[place] for name, column in batch.items()}, entries(number)[key(number)])


def test_of_two_shards_with_a_key_the_same_one_is_read_whoever_came_first(tmp_path: Path) -> None:
    first, second = ShardStore(tmp_path), ShardStore(tmp_path)
    first.write({key(1): {"mean": torch.tensor([1.0])}})
    second.write({key(1): {"mean": torch.tensor([2.0])}})
    first.refresh()
    second.refresh()
    second.save_index()
    stores = (first, second, ShardStore(tmp_path))
    assert len({float(store.read(key(1))["mean"]) for store in stores}) == 1
    assert {len(store) for store in stores} == {1}
    kept = shards_in(tmp_path)[1]
    shards_in(tmp_path)[0].unlink()
    for store in (*stores, ShardStore(tmp_path)):
        store.refresh()
        assert store.index.names == (kept.name,)
        assert len(store.read(key(1))) == 1


def test_what_others_add_and_remove_is_seen_after_a_refresh(tmp_path: Path) -> None:
    reader, writer = ShardStore(tmp_path), ShardStore(tmp_path)
    writer.write(entries(1))
    assert key(1) not in reader
    reader.refresh()
    assert holds(reader, entries(1))
    the_shard(tmp_path).unlink()
    writer.write(entries(2))
    reader.refresh()
    assert holds(reader, entries(2))
    assert reader.discarded == {}


def test_files_that_are_not_shards_are_left_alone(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(1))
    others = ["notes.txt", "model.safetensors", f"{key(1).hex()}.safetensors.tmp-0123abcd", key(1).hex()]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    (tmp_path / f"{key(2).hex()}.safetensors").mkdir()
    assert holds(ShardStore(tmp_path), entries(1))
    assert all((tmp_path / name).read_bytes() == b"not ours" for name in others)


def test_a_copy_in_another_process_opens_its_own_files(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, memory_bytes=1000)
    store.write(entries(1))
    assert holds(store, entries(1))
    copy = pickle.loads(pickle.dumps(store))
    store.close()
    assert holds(copy, entries(1))
    assert holds(store, entries(1))


def test_only_so_many_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    before = open_files()
    store = ShardStore(tmp_path)
    for number in range(6):
        store.write(entries(number))
    for _ in range(5):
        assert holds(store, entries(*range(6)))
        store.read_batch([key(number) for number in range(6)])
        store.refresh()
        assert open_files() == before + 2
    store.close()
    assert open_files() == before
    store.read(key(1))
    del store
    assert open_files() == before


def test_files_do_not_pile_up_when_shards_come_and_go(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    before = open_files()
    for number in range(20):
        store.write(entries(number))
        store.read(key(number))
        the_shard(tmp_path).unlink()
        store.refresh()
        assert open_files() == before
    assert len(store) == 0


def test_threads_may_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    store = ShardStore(tmp_path)
    for number in range(8):
        store.write(entries(number))

    def read_all(seed: int) -> bool:
        dice = random.Random(seed)
        numbers = [dice.randrange(8) for _ in range(100)]
        return all(same(store.read(key(number)), entries(number)[key(number)]) for number in numbers)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(8)))
    assert store.discarded == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400), max_size=20), max_size=5), st.lists(st.integers(0, 500), max_size=40))
def test_which_keys_there_are_is_found_as_by_comparing_all(parts: list[list[int]], asked: list[int]) -> None:
    def spread(number: int) -> bytes:  # with zeros at either end, and long equal beginnings
        middle = number.to_bytes(2, "big")
        return (bytes(14) + middle, middle + bytes(14), bytes(12) + middle + bytes(2), b"\xff" * 14 + middle)[number % 4]

    layout = Layout(20, 0, (), ())
    made = [sorted({spread(number) for number in part}) for part in parts]
    indexes = [ShardIndex.of_shard(str(place), layout, packed(part), packed(part)) for place, part in enumerate(made)]
    index = ShardIndex.empty().joined(indexes)
    there = {one for part in made for one in part}
    assert len(index) == len(there)
    wanted = [spread(number) for number in asked]
    assert (index.places(packed(wanted)) >= 0).tolist() == [one in there for one in wanted]
    for one in wanted:
        location = index.find(one)
        assert (location is not None) == (one in there)
        if location is not None:
            assert one in made[int(location.shard)]
            assert location == Location(one, min(str(p) for p, part in enumerate(made) if one in part), layout, location.row, one)
            assert made[int(location.shard)][location.row] == one
    left = index.only({"1", "3"})
    assert {one.tobytes() for one in left.keys} == {one for part in made[1:4:2] for one in part}


# Memory


def test_memory_keeps_what_was_read_first_and_no_more_than_it_may(tmp_path: Path) -> None:
    size = 24 * 2 + 5 * 4
    store = ShardStore(tmp_path, memory_bytes=3 * size + size // 2)
    store.write(entries(*range(6)))
    for _ in range(2):
        assert holds(store, entries(*range(6)))
        assert sum(map(len, store._memory.values())) == 3 * size
    the_shard(tmp_path).write_bytes(b"")
    batch = store.read_batch([key(2), key(0)])
    assert same({name: column[1] for name, column in batch.items()}, entries(0)[key(0)])
    with pytest.raises(CorruptEntry):
        store.read(key(3))
    assert len(pickle.dumps(store)) < 3 * size + 2000
    store.close()
    assert store._memory == {}


def test_memory_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))
    store.read(key(1))
    assert store._memory == {}


def test_memory_follows_the_content_and_not_the_key(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, memory_bytes=1000)
    for number in (1, 2):
        name = store.write({key(1): {"mean": torch.tensor([float(number)])}})
        assert float(store.read(key(1))["mean"]) == number
        (tmp_path / str(name)).unlink()
        store.refresh()


# Damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def lose_the_end_to_zeros(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def exchange(path: Path) -> None:
    other = ShardStore(path.parent.parent / "other")
    other.write(entries(7, 8))
    path.write_bytes(the_shard(other.folder).read_bytes())


DAMAGE = {
    "a flipped bit in the header length": lambda path: flip(path, 0),
    "a flipped bit in the header": lambda path: flip(path, 300),
    "a flipped bit in the data": lambda path: flip(path, path.stat().st_size - 1),
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": fill_with_zeros,
    "zeros in the second half": lose_the_end_to_zeros,
    "another shard under its name": exchange,
    "a web page": lambda path: path.write_bytes(b"<!DOCTYPE html>"),
}


def readable(store: ShardStore) -> dict[bytes, dict[str, torch.Tensor]]:
    """All entries that can be read."""
    found = {}
    for name in sorted(keys_of(store)):
        if name in store:
            with contextlib.suppress(CorruptEntry):
                found[name] = store.read(name)
    return found


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("moment", ["before it is opened", "while it is open"])
def test_a_damaged_shard_gives_no_wrong_bytes_is_removed_and_can_be_made_again(tmp_path: Path, kind: str, moment: str) -> None:
    store = ShardStore(tmp_path / "cache")
    store.write(entries(3))
    undamaged = the_shard(store.folder)
    path = store.folder / str(store.write(entries(1, 2)))
    if moment == "while it is open":
        store.read(key(1))
    else:
        store = ShardStore(store.folder)
    DAMAGE[kind](path)
    assert all(same(entry, entries(1, 2, 3)[name]) for name, entry in readable(store).items())
    store = ShardStore(store.folder)
    assert holds(store, entries(3))
    assert shards_in(store.folder) == [undamaged]
    store.write(entries(1, 2))
    assert holds(ShardStore(store.folder), entries(1, 2, 3))


@pytest.mark.parametrize("kind", DAMAGE)
def test_with_an_index_too_a_damaged_shard_gives_no_wrong_bytes(tmp_path: Path, kind: str) -> None:
    store = ShardStore(tmp_path / "cache")
    path = store.folder / str(store.write(entries(1, 2)))
    store.save_index()
    DAMAGE[kind](path)
    store = ShardStore(store.folder)
    found = readable(store)
    assert all(same(entry, entries(1, 2)[name]) for name, entry in found.items())
    assert len(found) == (2 if "header" in kind or kind == "a flipped bit in the data" else 0)  # then no entry was hit
    assert (path.name in store.discarded) == (not found)
    if found:
        assert store.check(path.name)
        assert list(store.discarded) == [path.name]
    assert not path.exists()


HEADER_PARTS = (b'"data_offsets"', b'"mean"', b'"F16"', b"aquatint.cache_format", key(2), b"[2,4,2,3]")


@pytest.mark.parametrize("part", HEADER_PARTS)
def test_a_damaged_header_is_noticed_when_the_store_is_opened(tmp_path: Path, part: bytes) -> None:
    ShardStore(tmp_path).write(entries(1, 2))
    path = the_shard(tmp_path)
    flip(path, path.read_bytes().index(part) + len(part) // 2)
    if part == b"aquatint.cache_format":
        with pytest.raises(UsageError):
            ShardStore(tmp_path)
        return
    store = ShardStore(tmp_path)
    assert len(store) == 0
    assert list(store.discarded) == [path.name]
    assert store.discarded[path.name]


def test_a_damaged_checksum_is_noticed_when_the_store_is_opened(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(1, 2))
    path = the_shard(tmp_path)
    flip(path, path.stat().st_size - 1 - (32 if path.read_bytes().endswith(key(1) + key(2)) else 0))
    assert ShardStore(tmp_path).discarded == {path.name: "its header is not the one that was written"}


def rename_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header, with its length kept right."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + content[8 + length :])


def exchange_fields(header: dict[str, Any]) -> None:
    header["mean"], header["std"] = header["std"], header["mean"]


def exchange_keys_and_checksums(header: dict[str, Any]) -> None:
    header["keys"], header["checksums"] = header["checksums"], header["keys"]


def rename_field(header: dict[str, Any]) -> None:
    header["st"] = header.pop("std")


def reshape_fields(header: dict[str, Any]) -> None:
    header["std"]["shape"] = [6]


def drop_keys(header: dict[str, Any]) -> None:
    header["other"] = header.pop("keys")


@pytest.mark.parametrize("change", [exchange_fields, exchange_keys_and_checksums, rename_field, reshape_fields, drop_keys])
def test_a_header_that_tells_another_tale_gives_no_wrong_bytes(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    store = ShardStore(tmp_path)
    store.write({key(number): {"mean": torch.arange(3.0) + number, "std": torch.arange(3.0) - number} for number in (1, 2)})
    rename_header(the_shard(tmp_path), change)
    assert readable(ShardStore(tmp_path)) == {}
    assert list(tmp_path.iterdir()) == []


def test_shards_that_changed_places_give_no_wrong_bytes(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    first, second = shards_in(tmp_path)
    content = first.read_bytes(), second.read_bytes()
    assert len(content[0]) == len(content[1])
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    store = ShardStore(tmp_path)
    assert len(store) == 4  # names and sizes are those of the index
    assert readable(store) == {}
    assert shards_in(tmp_path) == []
    assert store.discarded.keys() == {first.name, second.name}


def test_a_damaged_entry_of_a_batch_is_named(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))
    path = tmp_path / str(store.write(entries(2, 3)))
    flip(path, path.read_bytes().index(bytes(as_bytes(entries(3)[key(3)]["mean"]))))
    with pytest.raises(CorruptEntry, match=f"the cached entry {key(3).hex()} in {path} is damaged"):
        store.read_batch([key(1), key(2), key(3)])
    assert list(store.discarded) == [path.name]
    assert keys_of(store) == {key(1)}


def test_a_damaged_entry_is_named_when_it_is_read(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))
    path = the_shard(tmp_path)
    flip(path, path.read_bytes().index(bytes(as_bytes(entries(1)[key(1)]["mean"]))))
    with pytest.raises(CorruptEntry, match=f"the cached entry {key(1).hex()} in {path} is damaged: its bytes are not those") as caught:
        store.read(key(1))
    assert "run the same command again" in caught.value.hint
    assert caught.value.exit_code == 5
    assert list(store.discarded) == [path.name]
    assert key(1) not in store


def test_an_entry_whose_shard_another_process_removed_is_named(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(1))
    store = ShardStore(tmp_path)
    store.close()
    the_shard(tmp_path).unlink()
    with pytest.raises(CorruptEntry, match="its file is gone"):
        store.read(key(1))
    assert len(store.discarded) == 1


def test_an_entry_that_was_packed_anew_is_read_from_its_new_place(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    old = store.write(entries(1, 2))
    ShardStore(tmp_path).write(entries(1))
    (tmp_path / str(old)).unlink()
    assert same(store.read(key(1)), entries(1)[key(1)])
    assert store.discarded == {}
    with pytest.raises(KeyError):
        store.read(key(2))


def test_a_disk_that_fails_is_not_taken_for_a_damaged_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ShardStore(tmp_path).write(entries(1))
    store = ShardStore(tmp_path)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            store.read(key(1))
        patch.setattr(os, "pread", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            ShardStore(tmp_path)
    assert holds(store, entries(1))


def test_a_read_that_gives_less_than_was_asked_for_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1, 2))
    real = os.preadv

    def some(descriptor: int, buffers: list[Any], position: int) -> int:
        return real(descriptor, [memoryview(buffers[0]).cast("B")[:7]], position)

    monkeypatch.setattr(os, "preadv", some)
    assert holds(store, entries(1, 2))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_damaged_byte_is_ever_read_as_an_entry(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    ShardStore(folder).write(entries(1, 2))
    content = bytearray(the_shard(folder).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    the_shard(folder).write_bytes(content)
    found: Entries = {}
    with contextlib.suppress(UsageError):  # the byte was in the format's number
        found = readable(ShardStore(folder))
    assert all(same(entry, entries(1, 2)[name]) for name, entry in found.items())


@pytest.mark.parametrize("metadata", [{}, {"aquatint.cache_format": "1", "aquatint.checksums": "{}"}, {"aquatint.cache_format": "999"}])
def test_a_shard_of_another_format_is_refused_and_kept(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / f"{key(1).hex()}.safetensors"
    write_tensors(path, {"aa/mean": torch.zeros(1)}, metadata)
    with pytest.raises(UsageError, match=r"not written by this version .* this one reads 2") as caught:
        ShardStore(tmp_path)
    assert "new folder" in caught.value.hint
    assert path.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            store.write(entries(1))
    assert len(store) == 0
    assert list(tmp_path.iterdir()) == []


# The index


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards whose header is read."""
    names: list[str] = []
    real = shards.read_shard

    def read(path: Path) -> ShardIndex:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(shards, "read_shard", read)
    return names


def fill(folder: Path, *numbers: int) -> ShardStore:
    """A shard per number, and the index of them all."""
    store = ShardStore(folder)
    for number in numbers:
        store.write(entries(number, number + 100))
    store.save_index()
    return store


def expected(*numbers: int) -> dict[bytes, dict[str, torch.Tensor]]:
    return entries(*numbers, *(number + 100 for number in numbers))


def test_with_a_current_index_no_shard_is_opened(tmp_path: Path, headers_read: list[str]) -> None:
    fill(tmp_path, *range(5))
    headers_read.clear()
    store = ShardStore(tmp_path)
    assert len(store) == 10
    assert headers_read == []
    assert holds(store, expected(*range(5)))
    assert headers_read == []


def test_an_index_is_the_same_file_whoever_writes_it(tmp_path: Path) -> None:
    fill(tmp_path / "a", 1, 2, 3)
    fill(tmp_path / "b", 3, 1, 2)
    assert (tmp_path / "a" / INDEX_NAME).read_bytes() == (tmp_path / "b" / INDEX_NAME).read_bytes()


def test_an_index_is_only_written_when_something_changed(tmp_path: Path) -> None:
    ShardStore(tmp_path / "none").save_index()
    assert not (tmp_path / "none").exists()
    store = fill(tmp_path, 1, 2)
    before = (tmp_path / INDEX_NAME).stat()
    for same_content in (store, ShardStore(tmp_path)):
        same_content.save_index()
        assert (tmp_path / INDEX_NAME).stat() == before
    store.write(entries(3))
    store.save_index()
    assert (tmp_path / INDEX_NAME).stat().st_ino != before.st_ino


def test_an_index_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        store.save_index()
    assert [path.name for path in tmp_path.iterdir()] == [the_shard(tmp_path).name]
    store.save_index()
    assert (tmp_path / INDEX_NAME).exists()


def test_shards_that_came_and_went_since_the_index_was_written_are_noticed(tmp_path: Path, headers_read: list[str]) -> None:
    gone = set(shards_in(fill(tmp_path, 1).folder))
    fill(tmp_path, 2)
    late = ShardStore(tmp_path)
    late.write(entries(3, 103))
    for path in gone:
        path.unlink()
    headers_read.clear()
    store = ShardStore(tmp_path)
    assert holds(store, expected(2, 3))
    assert len(headers_read) == 1
    assert store.discarded == {}
    store.save_index()
    headers_read.clear()
    assert holds(ShardStore(tmp_path), expected(2, 3))
    assert headers_read == []


def test_what_another_process_indexed_is_taken_from_its_index(tmp_path: Path, headers_read: list[str]) -> None:
    reader = fill(tmp_path, 1)
    fill(tmp_path, 2, 3)
    headers_read.clear()
    reader.refresh()
    assert holds(reader, expected(1, 2, 3))
    assert headers_read == []
    before = (tmp_path / INDEX_NAME).stat()
    reader.save_index()
    assert (tmp_path / INDEX_NAME).stat() == before


def test_a_shard_of_another_size_than_the_index_says_is_looked_at(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    path = shards_in(tmp_path)[0]
    os.truncate(path, path.stat().st_size - 1)
    store = ShardStore(tmp_path)
    assert list(store.discarded) == [path.name]
    assert len(store) == 2


def put_foreign_index(path: Path) -> None:
    fill(path.parent / "other", 7)
    path.write_bytes((path.parent / "other" / INDEX_NAME).read_bytes())


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "a folder": replace_by_folder,
    "another version": lambda path: path.write_bytes(path.read_bytes().replace(b'index":"1"', b'index":"0"')),
    "that of other shards": put_foreign_index,
    **{kind: damage for kind, damage in DAMAGE.items() if damage is not exchange},
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_without_a_usable_index_everything_is_still_found(tmp_path: Path, kind: str, headers_read: list[str]) -> None:
    fill(tmp_path, 1, 2, 3)
    path = tmp_path / INDEX_NAME
    whole = path.read_bytes()
    UNUSABLE[kind](path)
    headers_read.clear()
    store = ShardStore(tmp_path)
    assert len(headers_read) == 3
    assert holds(store, expected(1, 2, 3))
    assert store.discarded == {}
    store.save_index()
    assert kind == "a folder" or path.read_bytes() == whole


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_damaged_byte_of_an_index_is_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    fill(folder, 1, 2)
    content = bytearray((folder / INDEX_NAME).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 700))
    content[place] = data.draw(st.integers(0, 255))
    (folder / INDEX_NAME).write_bytes(content)
    store = ShardStore(folder)
    assert holds(store, expected(1, 2))
    assert store.discarded == {}


def test_an_index_of_a_million_entries_opens_at_once_and_is_lean(tmp_path: Path) -> None:
    num_shards, each = 4000, 250
    layout = Layout(each, 4096, (Field("mean", "F16", (4, 128, 128)), Field("std", "F16", (4, 128, 128))), (200, 300))
    dice = np.random.default_rng(0)
    names = tuple(sorted(f"{dice.bytes(16).hex()}.safetensors" for _ in range(num_shards)))
    random_keys = dice.integers(0, 256, (num_shards * each, 16), dtype=np.uint8)
    random_keys = random_keys[np.argsort(random_keys.view("S16").ravel())]
    places = dice.permutation(num_shards * each).astype(np.int32)
    save_index(tmp_path, ShardIndex(random_keys, random_keys, places // each, places % each, names, (layout,) * num_shards))
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
    tracemalloc.start()
    started = time.process_time()  # other processes do not count
    store = ShardStore(tmp_path)
    seconds, (_, peak_bytes) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) == num_shards * each
    assert seconds < 2  # 0.1 on the machine this was written on, most of it for the names of the files
    index = store.index
    assert sum(column.nbytes for column in (index.keys, index.checksums, index.rows, index.shards)) == 40_000_000
    assert peak_bytes < 20_000_000  # what Python holds beside that
    asked = random_keys[::1000].copy()
    asked[::2, 7] ^= 1
    assert store.has(asked).tolist() == [False, True] * 500


# Several processes

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
fork = multiprocessing.get_context("fork")


def write_in_pairs(folder: Path, numbers: range) -> None:
    store = ShardStore(folder)
    for number in numbers:
        store.write(entries(number, number + 1))
        store.save_index()


@forks
def test_writers_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    writers = [fork.Process(target=write_in_pairs, args=(tmp_path, range(start, 20))) for start in (0, 0, 5)]
    for writer in writers:
        writer.start()
    reader = ShardStore(tmp_path)
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        assert readable(reader).keys() == keys_of(reader)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert holds(ShardStore(tmp_path), entries(*range(21)))
    assert len(shards_in(tmp_path)) == 20


@forks
def test_a_writer_that_is_killed_never_leaves_a_part_that_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(0)
    for _ in range(12):
        writer = fork.Process(target=write_in_pairs, args=(tmp_path, range(1000)))
        writer.start()
        writer.join(dice.uniform(0.005, 0.06))
        writer.kill()
        writer.join()
        store = ShardStore(tmp_path)
        assert store.discarded == {}
        assert holds(store, entries(*range(len(store))))
    assert len(store)
    monkeypatch.setattr(shards, "_ABANDONED_SECONDS", 0.0)
    store.remove_abandoned()
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_the_files_of_writers_at_work_are_not_taken_for_abandoned(tmp_path: Path) -> None:
    for name, age in (("young", 0), ("old", 7200)):
        path = tmp_path / f"{name}.safetensors.tmp-0123abcd"
        path.touch()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    ShardStore(tmp_path).remove_abandoned()
    assert [path.name for path in tmp_path.iterdir()] == ["young.safetensors.tmp-0123abcd"]
