"""From sources to one table: every picture with its captions, size and digest, and every one that cannot be used, with the reason.

Nothing is ever lost in silence: listed = used + rejected. Files are only read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aquatint.data.downloads import is_url
from aquatint.data.image import quiet_decoders
from aquatint.data.index import Keys, Table, fixed_bytes, place_in, take
from aquatint.data.indexing import Updated, list_source, update
from aquatint.data.places import Opener, Place
from aquatint.data.sources.listing import Role, Source
from aquatint.data.sources.names import MAX_NAMED, Names

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]

COLUMNS = (  # of the table, in this order
    "name", "path", "start", "length", "column", "digest", "height", "width", "is_reducible", "captions", "source",
    "mask_path", "mask_start", "mask_length", "mask_column", "mask_digest",
)  # fmt: skip
_ROWS_AT_ONCE = 8192
TAKEN_OUT = "is also a picture for validation"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that can be used. `digest` is the BLAKE2b-128 of the file's bytes; `size_hw` is upright.

    `name` is for people: the path from its source's own folder on, always printable. `source` counts the manifest's sources.
    `mask_digest` is empty without a mask.
    """

    name: str
    place: Place
    digest: bytes
    size_hw: tuple[int, int]
    captions: tuple[str, ...]
    source: int
    mask: Place | None = None
    mask_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A listed picture that is not used. `reason` reads well after the name; `place` and `digest` are None if they are not known.

    One that is not `bad` is left out for what it was to be used for, and no fault of its own.
    """

    name: str
    reason: str
    source: int = 0
    place: Place | None = None
    digest: bytes | None = None
    bad: bool = True


@dataclass(frozen=True)
class Manifest:
    """Everything that was found, in the order of the sources and then of their listings.

    `table` has a row for each usable picture, with the columns COLUMNS; it is mapped from files where it can be. `warnings`
    are about what is used, but perhaps not as meant. `others` counts the files left alone, by extension. `num_read` is how
    many pictures had to be looked into, and `num_damaged` how many files of the index had to be made anew.
    """

    table: Table
    sources: tuple[Source, ...]
    rejected: tuple[Rejected, ...] = ()
    warnings: tuple[str, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)
    num_read: int = field(default=0, compare=False)
    num_damaged: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def listed(self) -> int:
        return len(self) + len(self.rejected)

    @cached_property
    def sizes_hw(self) -> npt.NDArray[np.int32]:
        """Upright sizes in pixels, (n, 2)."""
        return np.stack([self.table["height"].to_numpy(), self.table["width"].to_numpy()], axis=1).astype(np.int32, copy=False)

    @cached_property
    def digests(self) -> Keys:
        """Digests of the pictures' bytes, (n, 16)."""
        return fixed_bytes(self.table["digest"])

    @cached_property
    def is_reducible(self) -> Bools:
        """Whether a picture can be decoded at a fraction of its size, (n,): see `image.Header`."""
        return np.asarray(self.table["is_reducible"].to_numpy(), dtype=bool)

    @cached_property
    def mask_digests(self) -> Keys:
        """Digests of the masks' bytes, (n, 16), zeros where there is none."""
        return fixed_bytes(self.table["mask_digest"])

    @cached_property
    def source_of(self) -> npt.NDArray[np.int16]:
        """Which of the sources each picture is from, (n,)."""
        numbers: npt.NDArray[np.int16] = self.table["source"].to_numpy().astype(np.int16, copy=False)
        return numbers

    @cached_property
    def has_caption(self) -> Bools:
        """Whether a picture has at least one caption that is not empty, (n,)."""
        counts: npt.NDArray[np.int32] = pc.list_value_length(self.table["captions"]).to_numpy()
        return np.asarray(counts > 0)

    def has_role(self, *roles: Role) -> Bools:
        """Whether a picture's source has one of these roles, (n,)."""
        return np.array([source.role in roles for source in self.sources], dtype=bool)[self.source_of]

    def name(self, row: int) -> str:
        name: str = self.table["name"][int(row)].as_py()
        return name

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(self.table["captions"][int(row)].as_py())

    def picture(self, row: int) -> Picture:
        return _picture(self.table.slice(range(len(self))[row], 1).to_pylist()[0])

    def pictures(self, rows: Sequence[int] | Int64s | None = None) -> Iterator[Picture]:
        """The pictures of these rows, or all, made as they are asked for: much faster than one by one."""
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = take(self.table, np.asarray(rows[start : start + _ROWS_AT_ONCE], dtype=np.int64))
            yield from map(_picture, some.to_pylist())

    def rows(self, indices: Sequence[int] | Int64s) -> Manifest:
        """These rows alone, in this order, with nothing rejected."""
        return replace(self, table=take(self.table, np.asarray(indices, dtype=np.int64)), rejected=(), warnings=(), others={})

    def without(self, reasons: Mapping[int, str], *, bad: bool = True) -> Manifest:
        """With the pictures in these rows rejected. `bad` says whether it is a fault of theirs, see `Rejected`."""
        if not reasons:
            return self
        order = sorted(reasons)
        more = (
            Rejected(one.name, reasons[row], one.source, one.place, one.digest, bad)
            for row, one in zip(order, self.pictures(order), strict=True)
        )
        kept = np.ones(len(self), dtype=bool)
        kept[order] = False
        return replace(self, table=take(self.table, np.flatnonzero(kept)), rejected=(*self.rejected, *more))


def _each(table: Table) -> Iterator[Mapping[str, Any]]:
    """The rows, one after the other; only a portion of them at a time takes memory."""
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _picture(row: Mapping[str, Any]) -> Picture:
    place = place_in(row)
    assert place is not None
    return Picture(
        row["name"], place, row["digest"], (row["height"], row["width"]), tuple(row["captions"]), row["source"],
        place_in(row, "mask_"), row["mask_digest"] or b"",
    )  # fmt: skip


def scan(
    sources: Sequence[Source],
    *,
    opener: Opener,
    max_pixels: int,
    index_folder: Path | None,
    quarantine: Mapping[bytes, str],
    on_progress: Callable[[int, int], None] | None = None,
    rehash: bool = False,
) -> Manifest:
    """Lists the sources, and reads header, digest, captions and mask of each picture that is not in the index or has changed.

    `quarantine` has contents that could not be decoded earlier, digest -> reason. `on_progress` gets pictures looked into
    and pictures to look into. With `rehash`, the times of files are not relied on. Raises DataError for a source that is
    missing or has no pictures, StorageError.
    """
    listings = [list_source(one, opener, index_folder=index_folder, max_pixels=max_pixels, rehash=rehash) for one in sources]
    done, total = 0, sum(len(listed.fresh) for listed in listings)

    def on_read() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    with quiet_decoders():
        updates = [update(listed, opener, max_pixels, on_read) for listed in listings]
    others: Counter[str] = Counter()
    for listed in listings:
        others.update(listed.remarks.others)
    manifest = Manifest(
        pa.concat_tables([_columns(one, number) for number, one in enumerate(updates)]),
        tuple(sources),
        tuple(rejected for number, one in enumerate(updates) for rejected in _rejected(one, number)),
        (*(text for one in updates for text in _warnings(one)), *_overlaps(sources, updates)),
        +others,
        total,
        sum(listed.num_damaged for listed in listings),
    )
    manifest = manifest.without(_quarantined(manifest, quarantine))
    manifest = _without_validation(manifest)
    return replace(manifest, warnings=(*manifest.warnings, *_copies(manifest)))


def _columns(update: Updated, source: int) -> Table:
    table = update.index.used
    numbers = pa.chunked_array([pa.array(np.full(len(table), source, np.int16))])
    table = table.select([name for name in COLUMNS if name != "source"])
    return table.add_column(COLUMNS.index("source"), "source", numbers)


def _rejected(update: Updated, source: int) -> Iterator[Rejected]:
    for row in _each(update.index.rejected):
        yield Rejected(row["name"], row["reason"], source, place_in(row), row["digest"])
    for name, reason in update.listed.remarks.problems:
        yield Rejected(name, reason, source)


def _quarantined(manifest: Manifest, quarantine: Mapping[bytes, str]) -> dict[int, str]:
    if not quarantine:
        return {}
    known = np.frombuffer(b"".join(quarantine), np.uint8).reshape(-1, 16)
    rows = np.flatnonzero(np.isin(halves(manifest.digests)[:, 0], halves(known)[:, 0]))
    found = ((int(row), quarantine.get(manifest.digests[row].tobytes())) for row in rows)
    return {row: reason for row, reason in found if reason is not None}


# Warnings


def _warnings(update: Updated) -> Iterator[str]:
    """What the listing said, and what was said about single pictures, gathered."""
    yield from update.listed.remarks.warnings
    remarks: dict[str, Names] = {}
    for column in ("notices", "remarks"):
        said = update.index.used.select(["name", column])
        for row in _each(said.filter(pc.greater(pc.list_value_length(said[column]), 0))):
            for text in row[column]:
                remarks.setdefault(text, Names()).add(row["name"])
    yield from (f"{names}: {text}" for text, names in remarks.items())
    if update.altered.count:
        yield f"{update.altered}: has other bytes than before, though its size and times are the same"


def _overlaps(sources: Sequence[Source], updates: Sequence[Updated]) -> Iterator[str]:
    """Folders that lie in one another, which is easily done to repeat some pictures more often, and counts them twice."""
    folders = {
        source.path: (Path(source.path).resolve(), update)
        for source, update in zip(sources, updates, strict=True)
        if source.kind == "folder" and not is_url(source.path)
    }
    for inner, (inner_place, inner_update) in folders.items():
        for outer, (outer_place, outer_update) in folders.items():
            if inner != outer and inner_place.is_relative_to(outer_place):
                start = f"{inner.rstrip('/')}/".encode("utf-8", "surrogatepass")
                shared = pc.sum(pc.starts_with(outer_update.index.rows["path"], start)).as_py() or 0
                count = len(inner_update.index) + shared
                yield f"the source {inner} lies in the source {outer}, and both use its pictures ({count:,} uses in all)"


def _copies(manifest: Manifest) -> Iterator[str]:
    rows = np.flatnonzero(~manifest.has_role("validation"))
    order, first = by_content(manifest.digests[rows])
    counts = np.diff(np.append(first, len(order)))
    copies = np.sort(rows[order[np.repeat(counts > 1, counts)]])
    if len(copies):
        yield f"{len(copies):,} pictures have an exact copy: {some_names(manifest, copies)}"


def some_names(manifest: Manifest, rows: Int64s, count: int = MAX_NAMED) -> str:
    """The names of the first of these rows, and how many there are more."""
    return str(Names(len(rows), [manifest.name(row) for row in rows[:count]]))


# Contents and the hold-out


def halves(digests: Keys) -> npt.NDArray[np.uint64]:
    """Digests (n, 16) as numbers (n, 2) that sort as they do."""
    return np.ascontiguousarray(digests).view(">u8").reshape(-1, 2).astype(np.uint64)


def by_content(digests: Keys) -> tuple[Int64s, Int64s]:
    """Rows sorted by digest, and at which places of that order a new digest begins."""
    numbers = halves(digests)
    order = np.argsort(numbers[:, 0], kind="stable")
    first, second = numbers[order].T
    if np.any((first[1:] == first[:-1]) & (second[1:] != second[:-1])):  # by chance, this never happens
        order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (numbers[order[1:]] != numbers[order[:-1]]).any(axis=1)
    return order.astype(np.int64), np.flatnonzero(is_new)


def _without_validation(manifest: Manifest) -> Manifest:
    """What is measured is never trained: copies of the pictures for validation are left out, and named."""
    is_measured = manifest.has_role("validation")
    copies = np.flatnonzero(~is_measured & is_content_of(manifest, is_measured))
    if not is_measured.any() or not len(copies):
        return manifest
    what = "picture is" if len(copies) == 1 else "pictures are"
    warning = f"{len(copies):,} {what} not trained, because the sources for validation have the same: {some_names(manifest, copies)}"
    manifest = manifest.without({int(row): TAKEN_OUT for row in copies}, bad=False)
    return replace(manifest, warnings=(*manifest.warnings, warning))


def is_content_of(manifest: Manifest, chosen: Bools) -> Bools:
    """Whether a picture has the same digest as one of the chosen, (n,)."""
    order, first = by_content(manifest.digests)
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(order))))
    held = np.zeros(len(first), dtype=bool)
    held[group[chosen]] = True
    return held[group]


def split(manifest: Manifest, *, share: float, max_pictures: int) -> tuple[Int64s, Int64s]:
    """Rows to train on and rows that are held out, each in the manifest's order.

    With sources for validation, these are what is held out, whatever the share. Otherwise a content is held out if its
    digest, as a number in 0..1, is below `share`: other pictures coming or going do not change that, and all copies are on
    one side. If that picks none, the lowest is taken; never more than `max_pictures` pictures, or half of the contents, or
    any that only a source for regularization has. A `share` of 0 holds out nothing.
    """
    is_measured = manifest.has_role("validation")
    if is_measured.any():
        return np.flatnonzero(~is_content_of(manifest, is_measured)), np.flatnonzero(is_measured)
    is_held = np.zeros(len(manifest), dtype=bool)
    if share > 0:
        order, first = by_content(manifest.digests)
        counts = np.diff(np.append(first, len(order)))
        can_be_held = np.logical_or.reduceat(manifest.has_role("train")[order], first) if len(order) else np.empty(0, bool)
        numbers = (halves(manifest.digests[order[first]])[:, 0] >> np.uint64(12)).astype(np.float64) / 2.0**52
        chosen = np.zeros(len(first), dtype=bool)
        chosen[_pick(np.flatnonzero(can_be_held), numbers, counts, share, max_pictures)] = True
        is_held[order] = np.repeat(chosen, counts)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _pick(contents: Int64s, numbers: npt.NDArray[np.float64], counts: Int64s, share: float, room: int) -> list[int]:
    """Contents, which are sorted by their number, to hold out: those below `share` that fit into the room."""
    below = contents[numbers[contents] < share]
    held: list[int] = []
    for content in (below if len(below) else contents[:1])[: len(contents) // 2]:
        if room == 0:
            break
        if counts[content] <= room:
            held.append(int(content))
            room -= int(counts[content])
    return held
