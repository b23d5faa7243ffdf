"""Where each entry of a cache folder lies: flat arrays, sorted by key, and the file that keeps them between runs.

An entry costs 40 bytes, and a million of them open in a fraction of a second. The file is only an accelerator: without
it, or if it is damaged or out of date, the same is learnt from the shards themselves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from aquatint.errors import ModelFileError, StorageError
from aquatint.tensor_file import DTYPES, TensorFile, as_bytes, write_tensors

Keys = npt.NDArray[np.uint8]  # (n, 16)
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

KEY_BYTES = 16
INDEX_NAME = "index.safetensors"
_FORMAT = "1"  # another one counts as no index at all
_FORMAT_KEY = "aquatint.cache_index"
_CHECKSUM_KEY = "aquatint.checksum"
_SUFFIX = ".safetensors"


class Field(NamedTuple):
    """A tensor that every entry of a shard has. `dtype` is the name in safetensors, `shape` that in one entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Layout:
    """What lies where in a shard: `fields` by name, and the position in the file of each one's first row."""

    num_entries: int
    file_bytes: int
    fields: tuple[Field, ...]
    starts: tuple[int, ...]

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        return tuple(field.num_bytes for field in self.fields)

    @cached_property
    def entry_bytes(self) -> int:
        return sum(self.row_bytes)


class Location(NamedTuple):
    """Where an entry lies, and the XXH3-128 of its bytes."""

    key: bytes
    shard: str
    layout: Layout
    row: int
    checksum: bytes


@dataclass(frozen=True)
class ShardIndex:
    """The entries of some shards, sorted by key. A key in several shards is there several times; the first shard by name counts.

    `names` are sorted, with a layout each; `shards` (n,) are places in them, `rows` (n,) places in the shards.
    """

    keys: Keys
    checksums: Keys
    shards: Int32s
    rows: Int32s
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]

    @classmethod
    def empty(cls) -> ShardIndex:
        none, nowhere = np.zeros((0, KEY_BYTES), np.uint8), np.zeros(0, np.int32)
        return cls(none, none, nowhere, nowhere, (), ())

    @classmethod
    def of_shard(cls, name: str, layout: Layout, keys: Keys, checksums: Keys) -> ShardIndex:
        """The index of one shard. Keys are sorted and all different, as they lie in it."""
        rows = np.arange(len(keys), dtype=np.int32)
        return cls(keys, checksums, np.zeros_like(rows), rows, (name,), (layout,))

    def __len__(self) -> int:
        """How many different keys there are."""
        return self._num_distinct

    def find(self, key: bytes) -> Location | None:
        place = int(self._words.searchsorted(key))
        if place == len(self.keys) or self.keys[place].tobytes() != key:
            return None
        shard = int(self.shards[place])
        return Location(key, self.names[shard], self.layouts[shard], int(self.rows[place]), self.checksums[place].tobytes())

    def places(self, keys: Keys) -> Int64s:
        """Where the keys (n, 16) stand in `self.keys`; -1 for those that do not."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        words = _as_words(keys)
        order = words.argsort()  # neighbours are found in memory that is at hand: three times as fast for a million
        places = np.empty(len(words), np.int64)
        places[order] = self._words.searchsorted(words[order])
        found = self._words[np.minimum(places, len(self.keys) - 1)] == words
        return np.where(found, places, -1)

    @cached_property
    def distinct(self) -> Bools:
        """Which entries count, (n,): the first of each key."""
        return np.concatenate([np.ones(min(1, len(self.keys)), np.bool_), self._words[1:] != self._words[:-1]])

    def joined(self, others: Sequence[ShardIndex]) -> ShardIndex:
        """With the entries of others, which have none of these shards and none of each other's."""
        parts = [part for part in (self, *others) if part.names]
        if len(parts) < 2:
            return parts[0] if parts else self
        layout_of = {name: layout for part in parts for name, layout in zip(part.names, part.layouts, strict=True)}
        names = tuple(sorted(layout_of))
        number = {name: place for place, name in enumerate(names)}
        renumbered = [np.array([number[name] for name in part.names], np.int32)[part.shards] for part in parts]
        keys, shards = np.concatenate([part.keys for part in parts]), np.concatenate(renumbered)
        order = np.lexsort((shards, _as_words(keys)))
        return ShardIndex(
            keys[order],
            np.concatenate([part.checksums for part in parts])[order],
            shards[order],
            np.concatenate([part.rows for part in parts])[order],
            names,
            tuple(layout_of[name] for name in names),
        )

    def only(self, names: Collection[str]) -> ShardIndex:
        """The part that is in some shards."""
        kept = np.array([name in names for name in self.names], np.bool_)
        if kept.all():
            return self
        chosen, number = kept[self.shards], (np.cumsum(kept) - 1).astype(np.int32)
        return ShardIndex(
            self.keys[chosen],
            self.checksums[chosen],
            number[self.shards[chosen]],
            self.rows[chosen],
            tuple(name for name, keep in zip(self.names, kept, strict=True) if keep),
            tuple(layout for layout, keep in zip(self.layouts, kept, strict=True) if keep),
        )

    @cached_property
    def _words(self) -> npt.NDArray[np.bytes_]:
        return _as_words(self.keys)

    @cached_property
    def _num_distinct(self) -> int:
        return int(self.distinct.sum())


_WORD = np.dtype(f"S{KEY_BYTES}")  # compares as 16 unsigned bytes, the first one first


def _as_words(keys: Keys) -> npt.NDArray[np.bytes_]:
    """Keys (n, 16) as (n,) texts of bytes, which can be sorted and searched."""
    return np.ascontiguousarray(keys).view(_WORD).reshape(-1)


# The file


def save_index(folder: Path, index: ShardIndex) -> None:
    """Writes the index of a folder's shards into it. Raises StorageError."""
    layouts = tuple(dict.fromkeys(index.layouts))
    number = {layout: place for place, layout in enumerate(layouts)}
    plain = [
        [layout.num_entries, layout.file_bytes, [[*field, start] for field, start in zip(layout.fields, layout.starts, strict=True)]]
        for layout in layouts
    ]
    columns: dict[str, npt.NDArray[Any]] = {
        "keys": index.keys,
        "checksums": index.checksums,
        "shards": index.shards,
        "rows": index.rows,
        "shard_names": _writable("".join(name.removesuffix(_SUFFIX) for name in index.names).encode()),
        "shard_layouts": np.array([number[layout] for layout in index.layouts], np.int32),
        "layouts": _writable(json.dumps(plain).encode()),
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    write_tensors(folder / INDEX_NAME, tensors, {_FORMAT_KEY: _FORMAT, _CHECKSUM_KEY: _checksum(tensors)})


def load_index(folder: Path) -> ShardIndex | None:
    """The index that was saved last, of whatever shards there were then. None if there is none that can be trusted."""
    try:
        with TensorFile(folder / INDEX_NAME) as file:
            if file.metadata.get(_FORMAT_KEY) != _FORMAT:
                return None
            tensors = {name: file.read(name) for name in file.tensors}
            if _checksum(tensors) != file.metadata.get(_CHECKSUM_KEY):
                return None
    except (ModelFileError, StorageError):
        return None
    columns = {name: tensor.numpy() for name, tensor in tensors.items()}
    names = columns["shard_names"].tobytes().decode()
    layouts = [_layout(*plain) for plain in json.loads(columns["layouts"].tobytes())]
    return ShardIndex(
        columns["keys"],
        columns["checksums"],
        columns["shards"],
        columns["rows"],
        tuple(names[start : start + 2 * KEY_BYTES] + _SUFFIX for start in range(0, len(names), 2 * KEY_BYTES)),
        tuple(layouts[number] for number in columns["shard_layouts"]),
    )


def _writable(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)


def _layout(num_entries: int, file_bytes: int, fields: Sequence[tuple[str, str, Sequence[int], int]]) -> Layout:
    return Layout(
        num_entries,
        file_bytes,
        tuple(Field(name, dtype, tuple(shape)) for name, dtype, shape, _ in fields),
        tuple(start for *_, start in fields),
    )


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, formats, shapes and bytes: what has this checksum was written by `save_index`."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(as_bytes(tensors[name]))
    return digest.hexdigest()
