"""Immutable, packed cache files.

A shard is a safetensors file with many entries; field `mean` of entry `<key>` is the tensor `<key>/mean`, so any tool can
open it. Its metadata holds a checksum per entry, and its name is the digest of those checksums: writing the same entries
twice, or in two processes at once, gives the same file. A shard appears whole or not at all. One that cannot be trusted
is removed as soon as that is noticed, and its entries count as missing: they are made again, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aquatint.errors import ModelFileError, StorageError, UsageError
from aquatint.storage import remove_file, remove_temporaries, storage_errors
from aquatint.tensor_file import TensorFile, as_bytes, dtype_name, write_tensors

FORMAT = "1"  # raise it when old code cannot read new shards, or new code old ones
_FORMAT_KEY = "aquatint.cache_format"
_CHECKSUMS_KEY = "aquatint.checksums"
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_FIELD_NAME = re.compile(r"[0-9a-f]+/[a-z_]+")
_MAX_OPEN_FILES = 128
_ABANDONED_SECONDS = 3600.0  # a shard is written in seconds: the writer of a temporary file this old is dead


class CorruptEntry(StorageError):
    """An entry whose bytes are not those that were written. Its shard is gone; the next build makes it again."""


class _Damage(Exception):
    """Why a shard cannot be trusted."""


class ShardStore:
    """The entries in the shards of one folder: a dict of CPU tensors per key.

    Picklable: a copy in another process opens its own files. Readers take no lock, and any number of processes may write.
    `discarded` tells which shards were removed, and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.discarded: dict[str, str] = {}
        self._shards: set[str] = set()
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, _Shard] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def keys(self) -> set[str]:
        return set(self._shard_of)

    def refresh(self) -> None:
        """Looks what has come and gone. Raises StorageError, and UsageError for shards of another version of the format."""
        with storage_errors("read", self.folder):
            found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        found = {name for name in found if _SHARD_NAME.fullmatch(name)}
        self._forget(self._shards - found)
        for name in sorted(found - self._shards):
            try:
                self._remember(name, self._shard(name).checksums)
            except _Damage as damage:
                self._discard(name, str(damage))

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """All fields of an entry. Raises KeyError if there is none, CorruptEntry if it is damaged, StorageError."""
        name = self._shard_of[key]
        try:
            return self._shard(name).read(key)
        except _Damage as damage:
            self._discard(name, f"entry {key}: {damage}")
            raise CorruptEntry(
                f"the cached entry {key} in {self.folder / name} is damaged: {damage}",
                hint="run the same command again to encode it anew; if that happens often, the disk is failing",
            ) from damage

    def write(self, entries: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Publishes entries together as one new shard. Raises StorageError, and then nothing of it can be seen."""
        if not entries:
            return
        plain = {key: {field: value.detach().cpu().contiguous() for field, value in entry.items()} for key, entry in entries.items()}
        tensors = {f"{key}/{field}": value for key, entry in plain.items() for field, value in entry.items()}
        if bad := [name for name in tensors if not _FIELD_NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r} is not hex digits, a slash, and a field name")
        checksums = {key: checksum(plain[key]) for key in sorted(plain)}
        name = _shard_name(checksums)
        write_tensors(self.folder / name, tensors, {_FORMAT_KEY: FORMAT, _CHECKSUMS_KEY: json.dumps(checksums)})
        self._remember(name, checksums)

    def remove_abandoned(self) -> None:
        """Removes the temporary files of writers that were killed."""
        remove_temporaries(self.folder, older_than_seconds=_ABANDONED_SECONDS)

    def close(self) -> None:
        """Closes the files; they are opened again when they are needed."""
        while self._open:
            self._open.popitem()[1].close()

    def _shard(self, name: str) -> _Shard:
        """The shard, open and checked; the least recently used one is closed when there are too many."""
        shard = self._open.pop(name, None) or _Shard(self.folder / name)
        self._open[name] = shard
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return shard

    def _remember(self, name: str, checksums: Mapping[str, str]) -> None:
        """Of two shards with the same key, the name decides: what is read must not depend on who came first."""
        self._shards.add(name)
        for key in checksums:
            self._shard_of[key] = min(name, self._shard_of.get(key, name))

    def _forget(self, names: set[str]) -> None:
        self._shards -= names
        if names:
            self._shard_of = {key: name for key, name in self._shard_of.items() if name not in names}
        for name in names & self._open.keys():
            self._open.pop(name).close()

    def _discard(self, name: str, reason: str) -> None:
        self._forget({name})
        self.discarded[name] = reason
        remove_file(self.folder / name)


class _Shard:
    """A shard that is open for reading, with a header that has been checked. Raises _Damage."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = TensorFile(path)
        except ModelFileError as error:
            raise _Damage(error.message) from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _Damage("its file is gone") from error
            raise
        try:
            self.checksums = _checksums(self._file)
            self._fields = _fields(self._file)
            if self.checksums.keys() != self._fields.keys():
                raise _Damage("its entries are not those that were written")
        except BaseException:
            self._file.close()
            raise

    def read(self, key: str) -> dict[str, torch.Tensor]:
        try:
            entry = {field: self._file.read(f"{key}/{field}") for field in self._fields[key]}
        except ModelFileError as error:
            raise _Damage(error.message) from error
        if checksum(entry) != self.checksums[key]:
            raise _Damage("its bytes are not those that were written")
        return entry

    def close(self) -> None:
        self._file.close()


def checksum(entry: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names, formats, shapes and bytes of an entry's contiguous CPU tensors: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for field, tensor in sorted(entry.items()):
        digest.update(json.dumps([field, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _shard_name(checksums: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(checksums, sort_keys=True).encode(), digest_size=16).hexdigest() + ".safetensors"


def _checksums(file: TensorFile) -> dict[str, str]:
    """The checksum of each entry, proven by the file's name."""
    version = file.metadata.get(_FORMAT_KEY)
    if version != FORMAT:  # before anything is called damaged: another version may name its files in another way
        raise UsageError(
            f"{file.path} was not written by this version of aquatint (its cache format is {version}, this one reads {FORMAT})",
            hint="point cache.folder at a new folder, or delete that file to have it made again",
        )
    try:
        checksums = json.loads(file.metadata[_CHECKSUMS_KEY])
        if isinstance(checksums, dict) and _shard_name(checksums) == file.path.name:
            return checksums
    except (KeyError, ValueError, RecursionError):
        pass
    raise _Damage("its header is not the one that was written")


def _fields(file: TensorFile) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for name in file.tensors:
        key, _, field = name.partition("/")
        fields.setdefault(key, []).append(field)
    return fields
