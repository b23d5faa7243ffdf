"""Brings the index of a source up to date: lists the source, and looks only into what is new or has changed."""

from __future__ import annotations

import io
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aquatint import storage
from aquatint.data.downloads import is_url, public_name
from aquatint.data.examine import Finding, examine
from aquatint.data.index import (
    NO_STAMP,
    SCHEMA,
    Index,
    IndexWriter,
    Int64s,
    Table,
    bytes_column,
    empty_listing,
    fixed_bytes,
    index_name,
    listing_table,
    load_index,
    load_parts,
    parse_index,
    place_in,
    save_part,
    split_by_reason,
    stamp_of,
    stamps_of,
    take,
)
from aquatint.data.places import Identity, Opener
from aquatint.data.sources import folder, tables, tar
from aquatint.data.sources.listing import Entry, Remarks, Source
from aquatint.data.sources.names import Names
from aquatint.errors import DataError, StorageError

Lister: TypeAlias = Callable[[Source, Opener, Remarks], Iterator[Entry]]

_THREADS = 8  # enough to keep a disk busy; hashing and reading run outside Python's lock
_URL_THREADS = 32  # each waits for an answer most of the time
_ROWS_AT_ONCE = 8192
_ROWS_A_THREAD = 256  # whose files are asked for their times at once
_PART_SECONDS = 60.0  # how much of a long first reading a crash may cost
_ABANDONED_SECONDS = 3600.0  # writing takes seconds: whoever began a temporary file that is this old is dead
_TICK_NS = 20_000_000  # a file that changes twice in so short a time may have the same times after both
_DECODER = f"Pillow {version('pillow')}"  # another one may read what this one cannot

_LISTERS: Mapping[str, Lister] = {"folder": folder.list_folder, "table": tables.list_table, "tar": tar.list_tars}
_CONTAINERS: Mapping[str, Callable[[Source, Opener], tuple[str, ...] | None]] = {
    "folder": folder.containers,
    "table": tables.containers,
    "tar": tar.containers,
}


@dataclass(frozen=True)
class Listed:
    """A source's listing, joined with what is known of it.

    `rows` (n,) has the number of each entry's row in the `known` index, or `len(known) + i` for row `i` of `fresh`, of the
    schema LISTING. `left` are files beside the index that become part of it. Nothing is kept without a `path`.
    """

    source: Source
    path: Path | None
    known: Index
    rows: Int64s
    fresh: Table
    remarks: Remarks
    metadata: Mapping[str, Any]
    left: tuple[Path, ...] = ()
    rereads: bool = False
    num_damaged: int = 0

    @property
    def is_unchanged(self) -> bool:
        """Whether the index is right as it stands: every row comes up once, the used ones and the others each in their order."""
        if self.left or len(self.fresh) or self.metadata != self.known.metadata or len(self.rows) != len(self.known):
            return False
        is_used = self.rows < len(self.known.used)
        order = np.concatenate([self.rows[is_used], self.rows[~is_used]])
        return bool(np.array_equal(order, np.arange(len(self.rows))))


@dataclass
class Updated:
    """An index that is up to date. `altered` names pictures whose bytes are others than before though size and times are not."""

    index: Index
    listed: Listed
    altered: Names = field(default_factory=Names)


# Listing


def list_source(source: Source, opener: Opener, *, index_folder: Path | None, max_pixels: int, rehash: bool = False) -> Listed:
    """Lists a source and looks up what is known of its files. With `rehash`, everything counts as new.

    Tars and tables that have not changed are not even listed. Raises DataError for a source that is missing or has no
    pictures, or whose tables or tars cannot be read, and StorageError.
    """
    path = index_folder / index_name(source, max_pixels) if index_folder else None
    known, left, num_damaged = _load_known(path) if path else (Index(), (), 0)
    containers = _identities(source, opener)
    vouching = containers if containers is None or _has_settled([Identity(*one[1:]) for one in containers], time.time_ns()) else []
    metadata: dict[str, Any] = {"decoder": _DECODER, "containers": vouching}
    if containers is not None and not rehash and not left and _may_stand(known, source, containers, opener):
        rows = np.arange(len(known), dtype=np.int64)
        return Listed(source, path, known, rows, empty_listing(), _remembered(known.metadata), known.metadata)
    remarks = Remarks()
    rows, fresh = _join(_LISTERS[source.kind](source, opener, remarks), None if rehash else known, len(known))
    if not len(rows) and not remarks.problems:
        raise _no_pictures(source, remarks)
    if containers is not None:
        problems = [list(problem) for problem in remarks.problems]
        metadata |= {"warnings": remarks.warnings, "others": dict(remarks.others), "problems": problems}
    return Listed(source, path, known, rows, fresh, remarks, metadata, left, rehash, num_damaged)


def _load_known(path: Path) -> tuple[Index, tuple[Path, ...], int]:
    """The index and what was left beside it, in one; the files of the latter; and how many files are damaged."""
    try:
        whole = load_index(path)
    except FileNotFoundError:
        whole = Index()
    parts = dict(load_parts(path))
    found = [one for one in (whole, *parts.values()) if one is not None]
    usable = [one if one.metadata.get("decoder") == _DECODER else replace(one, rejected=SCHEMA.empty_table()) for one in found]
    known = Index.joined(usable, {} if whole is None else whole.metadata)
    return known, tuple(parts), len(parts) + 1 - len(found)


def _identities(source: Source, opener: Opener) -> list[list[Any]] | None:
    """The files whose identity vouches for the whole listing, with it; None if there are no such files."""
    containers = _CONTAINERS[source.kind](source, opener)
    if containers is None:
        return None
    try:
        return [[path, *opener.identity(path)] for path in containers]
    except OSError:
        return []  # listing it will tell what is wrong


def _may_stand(known: Index, source: Source, containers: Sequence[Sequence[Any]], opener: Opener) -> bool:
    """Whether a listing of these containers would come to what is known already."""
    metadata = known.metadata
    if not containers or metadata.get("containers") != list(containers) or metadata.get("decoder") != _DECODER:
        return False
    if source.kind == "table" and metadata["problems"]:  # a file that was missing may be there now
        return False
    if not fixed_bytes(known.rows["stamp"]).any(axis=1).all():
        return False
    inside = {str(one[0]): Identity(*one[1:]) for one in containers}
    return all(_stands(batch, inside, opener) for batch in known.rows.select(_STAMPED).to_batches())


_STAMPED = [
    "path", "start", "length", "column", "mask_path", "mask_start", "mask_length", "mask_column", "picture_stamp", "mask_stamp",
]  # fmt: skip


def _stands(batch: Any, inside: Mapping[str, Identity], opener: Opener) -> bool:
    """Whether the files of these rows that are not in `inside` have the identities they had."""
    is_inside = [
        pc.is_in(batch.column(name), pa.array([path.encode("utf-8", "surrogatepass") for path in inside], pa.binary()))
        for name in ("path", "mask_path")
    ]
    no_mask = batch.column("mask_path").is_null()
    outside = pc.invert(pc.and_(is_inside[0], pc.or_(is_inside[1], no_mask)))
    rows = batch.filter(outside).to_pylist()

    def same(some: Sequence[Mapping[str, Any]]) -> bool:
        return all(_same(row, "", inside, opener) and _same(row, "mask_", inside, opener) for row in some)

    with ThreadPoolExecutor(_threads(rows)) as pool:
        return all(pool.map(same, (rows[start : start + _ROWS_A_THREAD] for start in range(0, len(rows), _ROWS_A_THREAD))))


def _same(row: Mapping[str, Any], prefix: str, inside: Mapping[str, Identity], opener: Opener) -> bool:
    place = place_in(row, prefix)
    if place is None:
        return True
    try:
        identity = inside.get(place.path) or opener.identity(place.path)
    except (OSError, StorageError):
        return False
    stamp: bytes = row["mask_stamp" if prefix else "picture_stamp"]
    return stamp_of(place, identity) == stamp


def _threads(rows: Sequence[Mapping[str, Any]]) -> int:
    return _URL_THREADS if rows and is_url(rows[0]["path"].decode("utf-8", "surrogatepass")) else _THREADS


def _remembered(metadata: Mapping[str, Any]) -> Remarks:
    return Remarks(list(metadata["warnings"]), Counter(metadata["others"]), [(name, reason) for name, reason in metadata["problems"]])


def _join(entries: Iterable[Entry], known: Index | None, first_new: int) -> tuple[Int64s, Table]:
    """Rows and fresh entries as in `Listed`, taken in portions."""
    parts: list[Int64s] = [np.empty(0, np.int64)]
    fresh = [empty_listing()]
    entries = iter(entries)
    while portion := list(itertools.islice(entries, _ROWS_AT_ONCE)):
        stamps = [stamps_of(entry) for entry in portion]
        keys = np.frombuffer(b"".join(stamp[0] for stamp in stamps), np.uint8).reshape(-1, 16)
        rows = np.full(len(portion), -1) if known is None else known.by_stamp.find(keys)
        new = np.flatnonzero(rows < 0)
        rows[new] = first_new + np.arange(len(new))
        first_new += len(new)
        parts.append(rows)
        if len(new):
            now = time.time_ns()
            some = [portion[i] for i in new]
            settled = [_has_settled((one.identity, one.caption_identity, one.mask_identity), now) for one in some]
            kept = [stamps[i] if is_sure else (NO_STAMP,) * 3 for i, is_sure in zip(new, settled, strict=True)]
            fresh.append(listing_table(some, kept))
    return np.concatenate(parts), pa.concat_tables(fresh)


def _has_settled(identities: Iterable[Identity | None], now_ns: int) -> bool:
    """Whether a change from now on is sure to show in all of these: the clocks of file systems tick slowly."""
    return all(one is None or abs(now_ns - one.ctime_ns) > _TICK_NS for one in identities)


def _no_pictures(source: Source, remarks: Remarks) -> DataError:
    content = f"it holds only {counted(remarks.others)}" if remarks.others else "it is empty"
    return DataError(
        f"there are no pictures in {public_name(source.path)}: {content}", hint="put pictures there, or correct the path in data.sources"
    )


def counted(extensions: Mapping[str, int]) -> str:
    """`2 .txt, 1 .zip`: numbers of files, the most frequent extension first."""
    ordered = sorted(extensions.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {extension or 'without an ending'}" for extension, count in ordered)


# Looking into what is new


def update(listed: Listed, opener: Opener, max_pixels: int, on_read: Callable[[], None]) -> Updated:
    """Looks into the fresh entries, and writes the new index if anything is different. `on_read` is called after each entry.

    Any number of processes may do this at once: each writes the whole. Raises StorageError.
    """
    if listed.is_unchanged:
        return Updated(listed.known, listed)
    pieces, rows, left = _examine_fresh(listed, opener, max_pixels, on_read)
    table = pa.concat_tables([listed.known.rows, *pieces])
    altered = _altered(listed, table, rows) if listed.rereads else Names()
    if listed.path is None:
        memory = io.BytesIO()
        _write(memory, table, rows, listed.metadata)
        return Updated(parse_index(pa.py_buffer(memory.getvalue())), listed, altered)
    storage.remove_temporaries(listed.path.parent, older_than_seconds=_ABANDONED_SECONDS)
    with storage.atomic_file(listed.path) as file:
        _write(file, table, rows, listed.metadata)
    for part in (*listed.left, *left):
        storage.remove_file(part)
    with storage.storage_errors("read", listed.path):
        index = load_index(listed.path)
    if index is None:
        raise StorageError(f"{listed.path} is damaged, though it was just written", hint="check the disk of cache.folder")
    return Updated(index, listed, altered)


def _write(file: Any, table: Table, rows: Int64s, metadata: Mapping[str, Any]) -> None:
    writer = IndexWriter(file)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        writer.add(*split_by_reason(take(table, rows[start : start + _ROWS_AT_ONCE])))
    writer.finish(metadata)


def _examine_fresh(listed: Listed, opener: Opener, max_pixels: int, on_read: Callable[[], None]) -> tuple[list[Table], Int64s, list[Path]]:
    """Tables with the fresh rows, the numbers of all rows among those of the known index and these, and files that hold them.

    What was found is saved about once a minute: reading a large set for the first time takes hours.
    """
    pieces: list[Table] = []
    waiting: list[Table] = []
    numbers: list[Int64s] = [np.arange(len(listed.known), dtype=np.int64)]
    left: list[Path] = []
    saved = time.monotonic()
    count = len(listed.known)
    for table in _examine_all(listed, opener, max_pixels, on_read):
        waiting.append(table)
        is_last = sum(map(len, (*pieces, *waiting))) == len(listed.fresh)
        if is_last or time.monotonic() - saved > _PART_SECONDS:
            piece = pa.concat_tables(waiting)
            order = np.arange(len(piece), dtype=np.int64)
            if listed.path and not is_last:
                piece, order, part = _saved(listed.path, piece)
                left.append(part)
            pieces.append(piece)
            numbers.append(count + order)
            count += len(piece)
            waiting, saved = [], time.monotonic()
    return pieces, np.concatenate(numbers)[listed.rows], left


def _saved(path: Path, piece: Table) -> tuple[Table, Int64s, Path]:
    """The rows as they are now in a file, where each of them is there, and the file."""
    used, rejected = split_by_reason(piece)
    part = save_part(path, used, rejected, {"decoder": _DECODER})
    is_rejected = piece["reason"].is_valid().to_numpy()
    order = np.empty(len(piece), dtype=np.int64)
    order[~is_rejected] = np.arange(len(used))
    order[is_rejected] = len(used) + np.arange(len(rejected))
    try:
        index = load_index(part)  # mapped, so that it takes no memory
    except FileNotFoundError:  # another process has just put it into its own index
        index = None
    return (pa.concat_tables([used, rejected]) if index is None else index.rows), order, part


def _examine_all(listed: Listed, opener: Opener, max_pixels: int, on_read: Callable[[], None]) -> Iterator[Table]:
    """Rows of the schema SCHEMA for the fresh ones, in their order."""
    source = listed.source
    known = Index() if listed.rereads else listed.known
    threads = _threads(listed.fresh.slice(0, 1).to_pylist())
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(listed.fresh), _ROWS_AT_ONCE):
            listing = listed.fresh.slice(start, _ROWS_AT_ONCE)
            before = _known_pictures(known, listing)
            findings = []
            for finding in pool.map(lambda row, old: examine(row, source, opener, max_pixels, old), listing.to_pylist(), before):
                findings.append(finding)
                on_read()
            yield _found(listing, findings)


def _known_pictures(known: Index, listing: Table) -> list[Finding | None]:
    """What is known of pictures that have not changed, though their captions or masks have."""
    rows = known.by_picture.find(fixed_bytes(listing["picture_stamp"]))
    findings: list[Finding | None] = [None] * len(listing)
    places = np.flatnonzero(rows >= 0)
    columns = known.rows.select(["digest", "height", "width", "notices", "is_reducible"])
    for place, row in zip(places, take(columns, rows[places]).to_pylist(), strict=True):
        if row["height"] is not None:
            findings[place] = Finding(row["digest"], (row["height"], row["width"]), tuple(row["notices"]), row["is_reducible"])
    return findings


def _found(listing: Table, findings: Sequence[Finding]) -> Table:
    """Rows of the schema SCHEMA from those of a listing and what was found."""
    lasts = np.array([finding.lasts for finding in findings])[:, None]
    found: dict[str, list[Any]] = {
        "digest": [one.digest for one in findings],
        "height": [one.size_hw and one.size_hw[0] for one in findings],
        "width": [one.size_hw and one.size_hw[1] for one in findings],
        "is_reducible": [one.is_reducible for one in findings],
        "captions": [one.captions for one in findings],
        "mask_digest": [one.mask_digest for one in findings],
        "notices": [one.notices for one in findings],
        "remarks": [one.remarks for one in findings],
        "reason": [one.reason for one in findings],
    }
    columns = {name: listing[name] for name in listing.column_names if name in SCHEMA.names}
    columns |= {name: bytes_column(np.where(lasts, fixed_bytes(listing[name]), np.uint8(0))) for name in ("stamp", "picture_stamp")}
    columns |= {name: pa.array(values, SCHEMA.field(name).type) for name, values in found.items()}
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _altered(listed: Listed, table: Table, rows: Int64s) -> Names:
    """Names of pictures that were read again, look untouched, and have another digest than before."""
    names = Names()
    fresh = take(table, np.sort(rows[rows >= len(listed.known)]))
    before = listed.known.by_picture.find(fixed_bytes(fresh["picture_stamp"]))
    old = fixed_bytes(listed.known.rows["digest"])[before]
    for row in np.flatnonzero((before >= 0) & (old != fixed_bytes(fresh["digest"])).any(axis=1)):
        names.add(fresh["name"][int(row)].as_py())
    return names
