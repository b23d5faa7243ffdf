"""Entries come back byte for byte, or not at all."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data import shards
from aquatint.data.shards import CorruptEntry, ShardStore
from aquatint.errors import StorageError, UsageError
from aquatint.tensor_file import write_tensors

Entries = Mapping[str, Mapping[str, torch.Tensor]]


def key(number: int) -> str:
    return f"{number:032x}"


def entries(*numbers: int) -> dict[str, dict[str, torch.Tensor]]:
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


def holds(store: ShardStore, expected: Entries) -> bool:
    return store.keys() == expected.keys() and all(same(store.read(name), entry) for name, entry in expected.items())


def the_shard(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_entries_read_back_in_their_own_format(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "cache")
    assert store.keys() == set()
    assert not store.folder.exists()
    store.write(entries(1, 2, 3))
    store.write(entries(4))
    store.write({})
    assert key(4) in store
    assert key(5) not in store
    assert holds(store, entries(1, 2, 3, 4))
    assert holds(ShardStore(tmp_path / "cache"), entries(1, 2, 3, 4))
    assert len(list(store.folder.iterdir())) == 2


def test_any_tool_can_open_a_shard(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(1, 2))
    with safetensors.safe_open(the_shard(tmp_path), "pt") as file:
        assert set(file.keys()) == {f"{key(number)}/{field}" for number in (1, 2) for field in ("mean", "pooled")}
        assert torch.equal(file.get_tensor(f"{key(2)}/mean"), entries(2)[key(2)]["mean"])


def test_views_of_a_batch_are_written_as_they_look(tmp_path: Path) -> None:
    batch = torch.arange(48.0).reshape(2, 8, 3).transpose(1, 2)
    ShardStore(tmp_path).write({key(1): {"mean": batch[1, :, ::2]}})
    assert torch.equal(ShardStore(tmp_path).read(key(1))["mean"], batch[1, :, ::2])


def test_an_unknown_key_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=key(1)):
        ShardStore(tmp_path).read(key(1))


@pytest.mark.parametrize("name", ["../x", "X", "", "ab/c"])
def test_only_hex_keys_are_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="hex digits"):
        ShardStore(tmp_path).write({name: {"mean": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


def test_the_same_entries_give_the_same_file_whoever_writes_them_in_whatever_order(tmp_path: Path) -> None:
    ShardStore(tmp_path / "a").write(entries(1, 2, 3))
    for numbers in ((3, 2, 1), (2, 1, 3)):
        ShardStore(tmp_path / "b").write(entries(*numbers))
    assert the_shard(tmp_path / "a").name == the_shard(tmp_path / "b").name
    assert the_shard(tmp_path / "a").read_bytes() == the_shard(tmp_path / "b").read_bytes()


def test_of_two_shards_with_a_key_the_same_one_is_read_whoever_came_first(tmp_path: Path) -> None:
    first, second = ShardStore(tmp_path), ShardStore(tmp_path)
    first.write({key(1): {"mean": torch.tensor([1.0])}})
    second.write({key(1): {"mean": torch.tensor([2.0])}})
    first.refresh()
    second.refresh()
    stores = (first, second, ShardStore(tmp_path))
    assert len({float(store.read(key(1))["mean"]) for store in stores}) == 1


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
    others = ["notes.txt", "model.safetensors", f"{key(1)}.safetensors.tmp-0123abcd", key(1)]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    assert holds(ShardStore(tmp_path), entries(1))
    assert all((tmp_path / name).read_bytes() == b"not ours" for name in others)


def test_a_copy_in_another_process_opens_its_own_files(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))
    assert holds(store, entries(1))
    copy = pickle.loads(pickle.dumps(store))
    store.close()
    assert holds(copy, entries(1))
    assert holds(store, entries(1))


def test_only_so_many_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = ShardStore(tmp_path)
    for number in range(6):
        store.write(entries(number))
    assert holds(store, entries(*range(6)))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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


def readable(store: ShardStore) -> dict[str, dict[str, torch.Tensor]]:
    """All entries that can be read."""
    found = {}
    for name in sorted(store.keys()):
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
    store.write(entries(1, 2))
    (path,) = set(store.folder.iterdir()) - {undamaged}
    if moment == "while it is open":
        store.read(key(1))
    else:
        store = ShardStore(store.folder)
    DAMAGE[kind](path)
    assert all(same(entry, entries(1, 2, 3)[name]) for name, entry in readable(store).items())
    store = ShardStore(store.folder)
    assert holds(store, entries(3))
    assert list(store.folder.iterdir()) == [undamaged]
    store.write(entries(1, 2))
    assert holds(ShardStore(store.folder), entries(1, 2, 3))


HEADER_PARTS = (b'"data_offsets"', b'"%s/mean"' % key(2).encode(), b'\\"%s\\": ' % key(2).encode(), b"aquatint.checksums")


@pytest.mark.parametrize("part", HEADER_PARTS)
def test_a_damaged_header_is_noticed_when_the_store_is_opened(tmp_path: Path, part: bytes) -> None:
    ShardStore(tmp_path).write(entries(1, 2))
    path = the_shard(tmp_path)
    flip(path, path.read_bytes().index(part) + len(part) // 2)
    store = ShardStore(tmp_path)
    assert store.keys() == set()
    assert list(store.discarded) == [path.name]
    assert store.discarded[path.name]


def test_a_damaged_checksum_is_noticed_when_the_store_is_opened(tmp_path: Path) -> None:
    ShardStore(tmp_path).write(entries(1, 2))
    path = the_shard(tmp_path)
    known = b'\\"%s\\": \\"' % key(2).encode()
    place = path.read_bytes().index(known) + len(known)
    content = bytearray(path.read_bytes())
    content[place] = ord("1") if content[place] == ord("0") else ord("0")
    path.write_bytes(content)
    assert ShardStore(tmp_path).discarded == {path.name: "its header is not the one that was written"}


def test_a_damaged_entry_is_named_when_it_is_read(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(entries(1))
    path = the_shard(tmp_path)
    flip(path, path.stat().st_size - 1)
    with pytest.raises(CorruptEntry, match=f"the cached entry {key(1)} in {path} is damaged: its bytes are not those") as caught:
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


@pytest.mark.parametrize("metadata", [{}, {"aquatint.cache_format": "999"}])
def test_a_shard_of_another_format_is_refused_and_kept(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / f"{key(1)}.safetensors"
    write_tensors(path, {f"{key(1)}/mean": torch.zeros(1)}, metadata)
    with pytest.raises(UsageError, match=r"not written by this version .* this one reads 1") as caught:
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
    assert store.keys() == set()
    assert list(tmp_path.iterdir()) == []


# Several processes

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
fork = multiprocessing.get_context("fork")


def write_in_pairs(folder: Path, numbers: range) -> None:
    store = ShardStore(folder)
    for number in numbers:
        store.write(entries(number, number + 1))


@forks
def test_writers_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    writers = [fork.Process(target=write_in_pairs, args=(tmp_path, range(start, 20))) for start in (0, 0, 5)]
    for writer in writers:
        writer.start()
    reader = ShardStore(tmp_path)
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        assert readable(reader).keys() == reader.keys()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert holds(ShardStore(tmp_path), entries(*range(21)))
    assert len(list(tmp_path.iterdir())) == 20


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
        assert holds(store, entries(*range(len(store.keys()))))
    assert store.keys()
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
