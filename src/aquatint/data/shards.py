"""The cache: entries in immutable shards, found by key.

A shard appears whole or not at all. One that cannot be trusted is removed as soon as that is noticed, and its entries
count as missing: they are made again, never guessed. Entries are read by position and proven by their checksum, every
time. Files are never mapped into memory: one that is cut short while it is being read is an error, and not the end of
the process.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aquatint.data.shard_file import Damage, Entry, checksum, read_shard, write_shard
from aquatint.data.shard_index import Bools, Field, Location, ShardIndex, load_index, save_index
from aquatint.data.shard_index import Keys as Keys
from aquatint.errors import StorageError
from aquatint.storage import remove_file, remove_temporaries, storage_errors
from aquatint.tensor_file import DTYPES, torch_dtype

_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_FOREIGN = {"BF16": "int16", "F8_E4M3": "int8", "F8_E5M2": "int8"}  # formats that numpy lacks, and what carries their bytes
_CARRIERS = {name: np.dtype(_FOREIGN.get(name, torch_name)) for name, (torch_name, _) in DTYPES.items()}
_MAX_OPEN_FILES = 128
_ABANDONED_SECONDS = 3600.0  # a shard is written in seconds: the writer of a temporary file this old is dead

Bytes = Any  # a contiguous numpy array; that these are buffers, typing knows only from Python 3.12 on


class CorruptEntry(StorageError):
    """An entry whose bytes are not those that were written. Its shard is gone; the next build makes it again."""


class ShardStore:
    """The entries in the shards of one folder: a dict of CPU tensors per key of 16 bytes.

    Picklable: a copy in another process opens its own files. Readers take no lock. Any number of processes may write, and
    any number of threads may read a store that none writes to. `discarded` tells which shards were removed, and why. Of
    the entries that are read, the first ones stay in memory, up to `memory_bytes`: in laps of ever new orders no choice
    is better, and to make room for the last ones read is much worse.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 0) -> None:
        self.folder = Path(folder)
        self.memory_bytes = memory_bytes
        self.discarded: dict[str, str] = {}
        self._joined = ShardIndex.empty()
        self._added: list[ShardIndex] = []  # joined when they are asked for: a builder writes many shards and asks for none
        self._names: set[str] = set()  # of all the shards above
        self._saved: frozenset[str] = frozenset()  # the shards in the index file, as far as we know
        self.close()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_memory", "_memory_left")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.close()

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: bytes) -> bool:
        return self.index.find(key) is not None

    @property
    def index(self) -> ShardIndex:
        """Where everything lies, as far as we know."""
        if self._added:
            self._joined, self._added = self._joined.joined(self._added), []
        return self._joined

    def keys(self) -> Keys:
        """All keys, sorted, (n, 16)."""
        return self.index.keys[self.index.distinct]

    def has(self, keys: Keys) -> Bools:
        """Which of the keys (n, 16) there are, (n,)."""
        return self.index.places(keys) >= 0

    def refresh(self) -> None:
        """Looks what has come and gone. Raises StorageError, and UsageError for shards of another version of the format."""
        found = _sizes(self.folder)
        known = _of_size(self.index, found)
        self._forget(self._names - known)
        unknown = found.keys() - known
        if unknown and (stored := load_index(self.folder)) is not None:
            self._saved = frozenset(stored.names)
            indexed = unknown & _of_size(stored, found)
            self._add(stored.only(indexed))
            unknown -= indexed
        for name in sorted(unknown):
            self._look_at(name)

    def read(self, key: bytes) -> dict[str, torch.Tensor]:
        """All fields of an entry. Raises KeyError if there is none, CorruptEntry if it is damaged, StorageError."""
        location = self._locate(key)
        columns = [np.empty(field.shape, _CARRIERS[field.dtype]) for field in location.layout.fields]
        self._read_into(columns, location)
        return _as_tensors(columns, location.layout.fields)

    def read_batch(self, keys: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """All fields of entries that look alike, (B, …). Raises as `read` does, and ValueError if they do not look alike."""
        locations = [self._locate(key) for key in keys]
        fields = locations[0].layout.fields
        if any(location.layout.fields != fields for location in locations):
            raise ValueError("a batch is of entries that look alike, and these have different fields, formats or shapes")
        columns = [np.empty((len(keys), *field.shape), _CARRIERS[field.dtype]) for field in fields]
        for place, location in enumerate(locations):
            self._read_into([column[place : place + 1] for column in columns], location)
        return _as_tensors(columns, fields)

    def write(self, entries: Mapping[bytes, Entry]) -> str | None:
        """Publishes entries that look alike together as one new shard, and returns its name; None for no entries.

        Raises StorageError, and then nothing of it can be seen; ValueError for entries that cannot be in one shard.
        """
        if not entries:
            return None
        name = write_shard(self.folder, entries)
        self._forget({name})
        self._look_at(name)
        return name

    def save_index(self) -> None:
        """Keeps the index for the next process that opens this folder. That it cannot be written is no error."""
        if self._saved != self._names:
            with contextlib.suppress(StorageError):
                save_index(self.folder, self.index)
                self._saved = frozenset(self._names)

    def check(self, name: str) -> str | None:
        """Reads a shard from its header to its last entry. If it is damaged, discards it and returns why."""
        try:
            index = read_shard(self.folder / name)
            parts = [np.empty(size, np.uint8) for size in index.layouts[0].row_bytes]
            for key in index.keys:
                location = index.find(key.tobytes())
                assert location is not None
                self._read_proven(parts, location)
        except Damage as damage:
            self._discard(name, str(damage))
            return str(damage)
        return None

    def remove(self, names: set[str]) -> None:
        """Removes shards whose entries nobody wants. Raises StorageError."""
        self._forget(names)
        for name in sorted(names):
            remove_file(self.folder / name)

    def remove_abandoned(self) -> None:
        """Removes the temporary files of writers that were killed."""
        remove_temporaries(self.folder, older_than_seconds=_ABANDONED_SECONDS)

    def close(self) -> None:
        """Closes the files and gives the memory back; both are taken again when they are needed."""
        self._close_files()
        self._memory: dict[bytes, bytes] = {}  # by checksum: in whatever shard the entry is, these are its bytes
        self._memory_left = self.memory_bytes

    def _close_files(self) -> None:
        self._open: Callable[[str], _OpenFile] = lru_cache(_MAX_OPEN_FILES)(partial(_open, self.folder))

    def _locate(self, key: bytes) -> Location:
        location = self.index.find(key)
        if location is None:
            raise KeyError(key.hex())
        return location

    def _read_into(self, parts: Sequence[Bytes], location: Location) -> None:
        """Fills an array per field with an entry from memory or disk. Raises CorruptEntry, StorageError."""
        held = self._memory.get(location.checksum)
        if held is not None:
            _scatter(held, parts)
            return
        try:
            self._read_proven(parts, location)
        except Damage as damage:
            self._discard(location.shard, str(damage))
            raise CorruptEntry(
                f"the cached entry {location.key.hex()} in {self.folder / location.shard} is damaged: {damage.reason}",
                hint="run the same command again to encode it anew; if that happens often, the disk is failing",
            ) from damage
        if location.layout.entry_bytes <= self._memory_left:
            self._memory[location.checksum] = b"".join(parts)
            self._memory_left -= location.layout.entry_bytes

    def _read_proven(self, parts: Sequence[Bytes], location: Location) -> None:
        """Raises Damage, StorageError."""
        try:
            try:
                self._read_fields(parts, location)
            except FileNotFoundError:
                location = self._elsewhere(location)
                self._read_fields(parts, location)
        except OSError as error:
            with storage_errors("read", self.folder / location.shard):
                raise error
        if checksum(parts) != location.checksum:
            raise Damage("its bytes are not those that were written", location.key)

    def _read_fields(self, parts: Sequence[Bytes], location: Location) -> None:
        file = self._open(location.shard)
        for part, size, start in zip(parts, location.layout.row_bytes, location.layout.starts, strict=True):
            position = start + location.row * size
            if size and os.preadv(file.descriptor, [part], position) < size and not _read_slowly(file.descriptor, part, position):
                raise Damage("its file ends too early", location.key)

    def _elsewhere(self, lost: Location) -> Location:
        """Another place of an entry whose shard is gone: others may have packed it anew. Raises Damage."""
        self.refresh()
        location = self.index.find(lost.key)
        if location is None or location.layout.fields != lost.layout.fields:
            raise Damage("its file is gone", lost.key)
        return location

    def _look_at(self, name: str) -> None:
        """Adds a shard whose header is whole, discards any other. Raises StorageError, UsageError."""
        try:
            self._add(read_shard(self.folder / name))
        except Damage as damage:
            self._discard(name, str(damage))

    def _add(self, index: ShardIndex) -> None:
        self._added.append(index)
        self._names.update(index.names)

    def _forget(self, names: set[str]) -> None:
        if names & self._names:
            self._joined = self.index.only(self._names - names)
            self._names -= names
            self._close_files()

    def _discard(self, name: str, reason: str) -> None:
        self._forget({name})
        self.discarded[name] = reason
        remove_file(self.folder / name)


class _OpenFile:
    """A file that is closed when nobody holds it any more: a thread may read from it while others crowd it out."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open(folder: Path, name: str) -> _OpenFile:
    return _OpenFile(os.open(folder / name, os.O_RDONLY))


def _read_slowly(descriptor: int, part: Bytes, position: int) -> bool:
    """Fills an array from a file, where one read may give less than was asked for. False if the file ends before. Raises OSError."""
    view, done = memoryview(part).cast("B"), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            return False
        done += count
    return True


def _as_tensors(columns: Sequence[Bytes], fields: Sequence[Field]) -> dict[str, torch.Tensor]:
    """The arrays as tensors of the fields' formats, in the same memory."""
    tensors = {field.name: torch.from_numpy(column) for field, column in zip(fields, columns, strict=True)}
    for field in fields:
        if field.dtype in _FOREIGN:
            tensors[field.name] = tensors[field.name].view(torch_dtype(field.dtype))
    return tensors


def _scatter(data: bytes, parts: Sequence[Bytes]) -> None:
    start = 0
    for part in parts:
        part.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, part.nbytes, start)
        start += part.nbytes


def _sizes(folder: Path) -> dict[str, int]:
    """The shards of a folder and their bytes. Raises StorageError."""
    sizes = {}
    with storage_errors("read", folder), contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _SHARD_NAME.fullmatch(entry.name) and entry.is_file():
                with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def _of_size(index: ShardIndex, sizes: Mapping[str, int]) -> set[str]:
    """The shards of the index that are as long as they should be."""
    return {name for name, layout in zip(index.names, index.layouts, strict=True) if sizes.get(name) == layout.file_bytes}
