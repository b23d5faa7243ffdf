"""What was found out about each picture of a source, kept as columns in a file, so that nothing has to be read twice.

The file is an Arrow stream, which any Arrow program can read, with our checksum behind it; it is mapped and not loaded.
It is an accelerator: what is damaged, missing or of another version is made anew.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from aquatint.data.places import Identity, Place
from aquatint.data.sources.listing import Entry, Source
from aquatint.storage import atomic_file

Table: TypeAlias = Any  # pyarrow.Table
Keys = npt.NDArray[np.uint8]  # (n, 16)
Int64s = npt.NDArray[np.int64]

VERSION = 2  # of the file: raise it when columns change
RULES = 1  # raise it when the same bytes give another size, digest or caption than before
NO_STAMP = bytes(16)  # of a row that is looked into again next time

_LISTED: list[tuple[str, Any]] = [
    ("name", pa.string()),
    ("path", pa.binary()), ("start", pa.int64()), ("length", pa.int64()), ("column", pa.binary()),
    ("mask_path", pa.binary()), ("mask_start", pa.int64()), ("mask_length", pa.int64()), ("mask_column", pa.binary()),
    ("stamp", pa.binary(16)), ("picture_stamp", pa.binary(16)), ("mask_stamp", pa.binary(16)),
    ("captions", pa.list_(pa.string())),
]  # fmt: skip
_FOUND: list[tuple[str, Any]] = [
    ("digest", pa.binary(16)), ("height", pa.int32()), ("width", pa.int32()), ("is_reducible", pa.bool_()), ("mask_digest", pa.binary(16)),
    ("notices", pa.list_(pa.string())), ("remarks", pa.list_(pa.string())), ("reason", pa.string()),
]  # fmt: skip
_CAPTION: list[tuple[str, Any]] = [
    ("caption_path", pa.binary()), ("caption_start", pa.int64()), ("caption_length", pa.int64()), ("caption_column", pa.binary()),
]  # fmt: skip
SCHEMA = pa.schema([*_LISTED, *_FOUND])
LISTING = pa.schema([*_LISTED, *_CAPTION])

_MAGIC = b"aquaindx"
_TRAILER = struct.Struct("<QQ16s8s")  # bytes of the stream, bytes of the metadata, checksum of both, magic
_CHUNK_BYTES = 4 << 20
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay"})  # file systems of one machine


# Stamps


def stamp_of(place: Place | None, identity: Identity | None) -> bytes:
    """16 bytes that differ for other places and for other versions of the same place."""
    if place is None:
        return NO_STAMP
    text = f"{place.path}\0{place.start}\0{place.length}\0{place.column}"
    if identity is not None:
        text += f"\0{identity.size}\0{identity.mtime_ns}\0{identity.ctime_ns}\0{identity.inode}"
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def stamps_of(entry: Entry) -> tuple[bytes, bytes, bytes]:
    """Stamps of everything that an entry says, of its picture, and of its mask."""
    picture, mask = stamp_of(entry.picture, entry.identity), stamp_of(entry.mask, entry.mask_identity)
    words = "\0".join((entry.name, *entry.captions)).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_128_digest(picture + mask + stamp_of(entry.caption, entry.caption_identity) + words), picture, mask


def listing_table(entries: Sequence[Entry], stamps: Sequence[tuple[bytes, bytes, bytes]]) -> Table:
    """Entries as columns of the schema LISTING."""
    columns: dict[str, list[Any]] = {
        "name": [entry.name for entry in entries],
        "captions": [entry.captions for entry in entries],
        "stamp": [stamp[0] for stamp in stamps],
        "picture_stamp": [stamp[1] for stamp in stamps],
        "mask_stamp": [stamp[2] for stamp in stamps],
        **_place_columns("", [entry.picture for entry in entries]),
        **_place_columns("mask_", [entry.mask for entry in entries]),
        **_place_columns("caption_", [entry.caption for entry in entries]),
    }
    return pa.table([pa.array(columns[one.name], one.type) for one in LISTING], schema=LISTING)


def empty_listing() -> Table:
    return LISTING.empty_table()


def _place_columns(prefix: str, places: Sequence[Place | None]) -> dict[str, list[Any]]:
    return {
        f"{prefix}path": [place and place.path.encode("utf-8", "surrogatepass") for place in places],
        f"{prefix}start": [place and place.start for place in places],
        f"{prefix}length": [place and place.length for place in places],
        f"{prefix}column": [place and place.column.encode("utf-8", "surrogatepass") for place in places],
    }


def place_in(row: Mapping[str, Any], prefix: str = "") -> Place | None:
    """The place in the columns `{prefix}path` and so on of a row; None if it has none."""
    path = row[f"{prefix}path"]
    if path is None:
        return None
    column = row[f"{prefix}column"].decode("utf-8", "surrogatepass")
    return Place(path.decode("utf-8", "surrogatepass"), row[f"{prefix}start"], row[f"{prefix}length"], column)


# Columns


def take(table: Table, rows: Int64s) -> Table:
    """Rows in any order. Unlike Arrow's own, it never has all of the table's text in memory at once."""
    if len(rows) and np.all(np.diff(rows) > 0):
        return _take_sorted(table, rows)
    order = np.argsort(rows, kind="stable")
    back = np.empty(len(rows), dtype=np.int64)
    back[order] = np.arange(len(rows))
    return _take_sorted(table, rows[order]).take(pa.array(back))


def _take_sorted(table: Table, rows: Int64s) -> Table:
    """Rows in rising order, batch by batch; what is whole or in one piece is not copied."""
    parts, start = [table.schema.empty_table()], 0
    for batch in table.to_batches():
        first, last = np.searchsorted(rows, [start, start + len(batch)])
        inside = rows[first:last] - start
        if len(inside) and inside[-1] - inside[0] == len(inside) - 1 and len(np.unique(inside)) == len(inside):
            parts.append(pa.Table.from_batches([batch.slice(int(inside[0]), len(inside))]))
        elif len(inside):
            parts.append(pa.Table.from_batches([batch.take(pa.array(inside))]))
        start += len(batch)
    return pa.concat_tables(parts)


def fixed_bytes(column: Any, width: int = 16) -> Keys:
    """A column of `width` bytes as (n, width); zeros where it is null."""
    chunks = [column] if isinstance(column, pa.Array) else column.chunks
    parts = [np.empty((0, width), np.uint8)]
    for chunk in chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width).reshape(-1, width)
        if chunk.null_count:
            data = np.where(chunk.is_null().to_numpy(zero_copy_only=False)[:, None], np.uint8(0), data)
        parts.append(data)
    return np.concatenate(parts)


def bytes_column(keys: Keys) -> Any:
    """Keys (n, 16) as a column of 16 bytes."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


def split_by_reason(table: Table) -> tuple[Table, Table]:
    """The rows of pictures that can be used, and those of the others."""
    is_rejected = table["reason"].is_valid()
    return table.filter(pc.invert(is_rejected)), table.filter(is_rejected)


class Lookup:
    """Finds keys (n, 16) by their first half, in one go for many."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        halves = _first_halves(keys)
        self._order = np.argsort(halves, kind="stable")
        self._halves = halves[self._order]

    def find(self, keys: Keys) -> Int64s:
        """The first row that has each key (m, 16), or -1, as (m,).

        Keys of zeros are never found, nor is one behind another with the same first half, which does not happen by chance.
        """
        if not len(self._order):
            return np.full(len(keys), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._halves, _first_halves(keys)), len(self._order) - 1)
        rows = self._order[places]
        return np.where((self._keys[rows] == keys).all(axis=1) & keys.any(axis=1), rows, -1).astype(np.int64)


def _first_halves(keys: Keys) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


# The file


@dataclass(frozen=True)
class Index:
    """Rows of the schema SCHEMA in the order of the listing: of pictures that can be used, and of those that cannot.

    `metadata` is what the source said of its listing as a whole. Rows are numbered through, the used ones first.
    """

    used: Table = field(default_factory=SCHEMA.empty_table)
    rejected: Table = field(default_factory=SCHEMA.empty_table)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.used) + len(self.rejected)

    @cached_property
    def rows(self) -> Table:
        return pa.concat_tables([self.used, self.rejected])

    @cached_property
    def by_stamp(self) -> Lookup:
        return Lookup(fixed_bytes(self.rows["stamp"]))

    @cached_property
    def by_picture(self) -> Lookup:
        return Lookup(fixed_bytes(self.rows["picture_stamp"]))

    @classmethod
    def joined(cls, indexes: Sequence[Index], metadata: Mapping[str, Any]) -> Index:
        """The rows of all of them."""
        used, rejected = (SCHEMA.empty_table() for _ in range(2))
        for one in indexes:
            used, rejected = pa.concat_tables([used, one.used]), pa.concat_tables([rejected, one.rejected])
        return cls(used, rejected, metadata)


def index_name(source: Source, max_pixels: int) -> str:
    """The file's name, which differs if anything differs that decides what is in it."""
    definition = [
        VERSION, RULES, max_pixels, source.path, source.kind, source.caption_extensions, source.caption_lines,
        source.picture_column, source.caption_columns, source.mask_column, source.masks,
    ]  # fmt: skip
    return f"{xxhash.xxh3_128_hexdigest(json.dumps(definition).encode())}.index"


class IndexWriter:
    """Writes rows into an open file as they come; `finish` makes it whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._sink = _Sink(file)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), SCHEMA)

    def add(self, used: Table, rejected: Table) -> None:
        for table in (used, rejected):
            if len(table):
                self._stream.write_table(table.combine_chunks())

    def finish(self, metadata: Mapping[str, Any]) -> None:
        self._stream.close()
        stream_bytes = self._sink.count
        text = json.dumps(metadata).encode()
        self._sink.write(text)
        self._sink.file.write(_TRAILER.pack(stream_bytes, len(text), self._sink.digest.digest(), _MAGIC))


class _Sink:
    """A file for Arrow to write to, that counts and digests what is written."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count, self.digest = file, 0, xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def load_index(path: Path) -> Index | None:
    """The index in a file. None if it is damaged or of another version. Raises FileNotFoundError.

    It is mapped where that is safe: on a network's disk, a file that is replaced by another machine can take its pages along.
    """
    try:
        with path.open("rb") as file:
            _check(file)
            if _is_on_local_disk(path):
                return parse_index(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
            file.seek(0)
            return parse_index(pa.py_buffer(file.read()))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def _check(file: BinaryIO) -> None:
    """Raises ValueError unless the checksum is right. The pages that this reads do not become part of the process."""
    size = os.fstat(file.fileno()).st_size - _TRAILER.size
    digest, done = xxhash.xxh3_128(), 0
    while chunk := file.read(max(0, min(_CHUNK_BYTES, size - done))):
        digest.update(chunk)
        done += len(chunk)
    trailer = file.read(_TRAILER.size)
    if len(trailer) < _TRAILER.size or trailer[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("is not an index, or is cut off")
    if _TRAILER.unpack(trailer)[2] != digest.digest():
        raise ValueError("is damaged")


def _is_on_local_disk(path: Path) -> bool:
    """Whether the file system is known to keep what is mapped. False where that cannot be told."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        real = path.resolve()
    except OSError:
        return False
    kinds: dict[Path, str] = {}
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        kinds[Path(before.split()[4].encode().decode("unicode_escape"))] = after.split()[0]
    return next((kinds[folder] in _LOCAL for folder in real.parents if folder in kinds), False)


def parse_index(buffer: Any) -> Index:
    """The index in a whole and checked buffer. Raises ValueError for another version."""
    stream_bytes, text_bytes, _, _ = _TRAILER.unpack(buffer.slice(buffer.size - _TRAILER.size))
    metadata = json.loads(buffer.slice(stream_bytes, text_bytes).to_pybytes())
    stream = pa.ipc.open_stream(pa.BufferReader(buffer.slice(0, stream_bytes)))
    if stream.schema != SCHEMA:
        raise ValueError("has other columns")
    used: list[Any] = []
    rejected: list[Any] = []
    for batch in stream:
        (used if batch.column("reason").null_count else rejected).append(batch)
    return Index(pa.Table.from_batches(used, SCHEMA), pa.Table.from_batches(rejected, SCHEMA), metadata)


# Parts: what a long first reading has found so far


def save_part(path: Path, used: Table, rejected: Table, metadata: Mapping[str, Any]) -> Path:
    """Keeps rows of an index that is not whole yet, beside it. Raises StorageError."""
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:12]}.part")
    with atomic_file(part) as file:
        writer = IndexWriter(file)
        writer.add(used, rejected)
        writer.finish(metadata)
    return part


def load_parts(path: Path) -> Iterator[tuple[Path, Index | None]]:
    """The parts that were left behind beside an index, None for a damaged one."""
    for part in sorted(path.parent.glob(f"{path.stem}.*.part")):
        try:
            yield part, load_index(part)
        except FileNotFoundError:  # another process has just put it into the whole
            continue
