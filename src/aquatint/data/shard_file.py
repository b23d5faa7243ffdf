"""One shard: a packed file of cache entries that look alike.

It is a safetensors file: field `mean` of all its entries is the tensor `mean`, with a row per entry, so any tool can
open it. Two more tensors hold the entries' `keys` and `checksums` (N, 16). Its name is the digest of its fields, keys
and checksums: writing the same entries twice, or in two processes at once, gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from aquatint.data.shard_index import KEY_BYTES, Field, Keys, Layout, ShardIndex
from aquatint.errors import ModelFileError, StorageError, UsageError
from aquatint.storage import atomic_file
from aquatint.tensor_file import DTYPES, TensorFile, as_bytes, dtype_name

FORMAT = "2"  # raise it when old code cannot read new shards, or new code old ones
_FORMAT_KEY = "aquatint.cache_format"
_KEYS, _CHECKSUMS = "keys", "checksums"
_FIELD_NAME = re.compile(r"[a-z_]+")

Entry = Mapping[str, torch.Tensor]


class Damage(Exception):
    """Why a shard cannot be trusted; the key of the entry where that showed."""

    def __init__(self, reason: str, key: bytes = b"") -> None:
        super().__init__(f"entry {key.hex()}: {reason}" if key else reason)
        self.reason = reason


def checksum(fields: Iterable[Any]) -> bytes:
    """XXH3-128 of an entry: of the bytes of its fields, ordered by name. What they are called and mean is proven by the shard's name."""
    digest = xxhash.xxh3_128()
    for field in fields:
        digest.update(field)
    return digest.digest()


# Writing


def write_shard(folder: Path, entries: Mapping[bytes, Entry]) -> str:
    """Publishes entries as a file of their own, and returns its name. Raises StorageError, ValueError."""
    keys, fields = sorted(entries), _common_fields(entries)
    columns = {field.name: [as_bytes(entries[key][field.name].detach().cpu().contiguous()) for key in keys] for field in fields}
    checksums = [checksum(row) for row in zip(*columns.values(), strict=True)]
    own = {_KEYS: keys, _CHECKSUMS: checksums}
    kinds = sorted([*fields, *(Field(name, "U8", (KEY_BYTES,)) for name in own)], key=_widest_first)
    name = _shard_name(fields, _packed(keys), _packed(checksums))
    with atomic_file(folder / name) as file:
        file.write(_header(kinds, len(keys)))
        for kind in kinds:
            for row in own.get(kind.name) or columns[kind.name]:
                file.write(row)
    return name


def _header(kinds: Sequence[Field], num_rows: int) -> bytes:
    """The beginning of a safetensors file of these tensors, each with a row per entry."""
    header: dict[str, Any] = {"__metadata__": {_FORMAT_KEY: FORMAT}}
    end = 0
    for kind in kinds:
        start, end = end, end + num_rows * kind.num_bytes
        header[kind.name] = {"dtype": kind.dtype, "shape": [num_rows, *kind.shape], "data_offsets": [start, end]}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _widest_first(field: Field) -> tuple[int, str]:
    """The order that keeps every tensor of a file aligned."""
    return -DTYPES[field.dtype][1], field.name


def _packed(values: Sequence[bytes]) -> Keys:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, KEY_BYTES)


def _shard_name(fields: Sequence[Field], keys: Keys, checksums: Keys) -> str:
    digest = hashlib.blake2b(json.dumps([FORMAT, fields]).encode(), digest_size=16)
    digest.update(keys.tobytes())
    digest.update(checksums.tobytes())
    return digest.hexdigest() + ".safetensors"


def _common_fields(entries: Mapping[bytes, Entry]) -> tuple[Field, ...]:
    """What all entries have, by name. Raises ValueError if they differ, or cannot be written."""
    if bad := [key for key in entries if len(key) != KEY_BYTES]:
        raise ValueError(f"the key {bad[0].hex()} has {len(bad[0])} bytes instead of {KEY_BYTES}")
    kinds = {
        tuple(sorted(Field(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in entry.items()))
        for entry in entries.values()
    }
    if len(kinds) > 1:
        raise ValueError(f"the entries of a shard look alike, these are of {len(kinds)} kinds: {sorted(kinds)[:2]}")
    (fields,) = kinds
    if not fields or any(not _FIELD_NAME.fullmatch(field.name) or field.name in (_KEYS, _CHECKSUMS) for field in fields):
        raise ValueError(f"{[field.name for field in fields]} are no names of fields")
    return fields


# Reading


def read_shard(path: Path) -> ShardIndex:
    """What is in a shard, proven by its name. Raises Damage, StorageError, and UsageError for another format."""
    try:
        with TensorFile(path) as file:
            _check_format(file)
            keys, checksums = (_read_own(file, name) for name in (_KEYS, _CHECKSUMS))
            layout = _layout_of(file, len(keys))
    except ModelFileError as error:
        raise Damage(error.message) from error
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise Damage("its file is gone") from error
        raise
    if _shard_name(layout.fields, keys, checksums) != path.name:
        raise Damage("its header is not the one that was written")
    return ShardIndex.of_shard(path.name, layout, keys, checksums)


def _check_format(file: TensorFile) -> None:
    """Before anything is called damaged: another version may name its files in another way."""
    version = file.metadata.get(_FORMAT_KEY)
    if version != FORMAT:
        raise UsageError(
            f"{file.path} was not written by this version of aquatint (its cache format is {version}, this one reads {FORMAT})",
            hint="point cache.folder at a new folder, or delete that file to have it made again",
        )


def _read_own(file: TensorFile, name: str) -> Keys:
    info = file.tensors.get(name)
    if info is None or info.dtype != "U8" or len(info.shape) != 2 or info.shape[1] != KEY_BYTES:
        raise Damage(f"its header has no `{name}`")
    return file.read(name).numpy()


def _layout_of(file: TensorFile, num_entries: int) -> Layout:
    infos = {name: file.tensors[name] for name in sorted(file.tensors.keys() - {_KEYS, _CHECKSUMS})}
    if any(info.shape[:1] != (num_entries,) for info in infos.values()):
        raise Damage("its tensors have not a row for each entry")
    return Layout(
        num_entries,
        max(info.end for info in file.tensors.values()),
        tuple(Field(name, info.dtype, info.shape[1:]) for name, info in infos.items()),
        tuple(info.start for info in infos.values()),
    )
