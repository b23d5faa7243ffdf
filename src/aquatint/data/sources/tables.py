"""Tables of pictures: JSON Lines, CSV, Parquet, the JSON of sd-scripts, and folders with a metadata file (Hugging Face's imagefolder).

A table is read once, row by row, so that its length does not matter; pictures in its cells are not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from aquatint.data.caption_text import BadCaption, clean_caption
from aquatint.data.downloads import glob_remote, is_url, public_name
from aquatint.data.places import Identity, Opener, Place
from aquatint.data.sources.columns import Columns, find_columns
from aquatint.data.sources.listing import Entry, Remarks, Source
from aquatint.data.sources.names import extension, printable
from aquatint.data.sources.parquet_rows import Cell, open_parquet, parquet_kinds, read_parquet
from aquatint.data.sources.text_rows import KEY, BadTable, Row, kind_of, read_csv, read_json, read_json_lines
from aquatint.errors import DataError, StorageError

ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TAGS = ("tags", "tag_string")  # a list in one of these columns is one caption
_SIDES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".PNG", ".JPG", ".JPEG", ".WEBP", ".BMP")  # not in all keys of sd-scripts
_ROW_WORDS = {".parquet": "row", ".json": "entry"}
_PEEK_ROWS = 100
_URL_THREADS = 32  # each waits for an answer most of the time


@dataclass(frozen=True)
class _Table:
    """A table while it is read. `is_joined`: caption and tags are one caption; `by_line`: each line is one of its own."""

    path: str
    folder: str
    folder_name: str
    columns: Columns
    identity: Identity
    is_joined: bool
    by_line: bool
    opener: Opener

    def label(self, number: int) -> str:
        return f"{_shown(_basename(self.path))}, {_ROW_WORDS.get(_ending(self.path), 'line')} {number}"


def list_table(source: Source, opener: Opener, remarks: Remarks) -> Iterator[Entry]:
    """The pictures of all tables of a source, in the order of their rows; rows without a picture become problems.

    A cell that is a list has alternatives, and so have several caption columns; only tags in a list are one caption, and
    so are `caption` and `tags` in the JSON of sd-scripts. Rows of Parquet count from 0, lines and entries from 1. Raises
    DataError for a table that cannot be read, or in which a column is not found.
    """
    for path in containers(source, opener):
        try:
            yield from _list_one(path, source, opener, remarks)
        except BadTable as error:
            raise DataError(f"the table {public_name(path)} {error}", hint="repair it, or take it out of data.sources") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"the table {public_name(path)} cannot be read: {reason}", hint="check the path, and who may read it"
            ) from error


def containers(source: Source, opener: Opener) -> tuple[str, ...]:
    """The files of the tables, sorted. Raises DataError if there are none."""
    paths = _expand(source.path)
    if not paths:
        raise DataError(f"there is no table {public_name(source.path)}", hint="correct the path in data.sources")
    for path in paths:
        if _ending(path) not in ENDINGS:
            raise DataError(f"{public_name(path)} is not a table that can be read", hint=f"name files that end in {', '.join(ENDINGS)}")
    return paths


def _expand(path: str) -> tuple[str, ...]:
    if is_url(path):
        return tuple(glob_remote(path)) if "*" in path else (path,)
    if Path(path).is_dir():
        return (str(_metadata_file(Path(path))),)
    return (path,) if Path(path).exists() else tuple(sorted(glob(path, recursive=True), key=os.fsencode))  # noqa: PTH207


def _metadata_file(folder: Path) -> Path:
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise DataError(f"{folder} has {' and '.join(found)}", hint="name the one that counts as the path in data.sources")
    raise DataError(
        f"the folder {folder} has no table: none of {', '.join(METADATA)}",
        hint='name the table itself, or several as in "data/*.parquet"; a folder with caption files is of kind "folder"',
    )


def _list_one(path: str, source: Source, opener: Opener, remarks: Remarks) -> Iterator[Entry]:
    identity = opener.identity(path)
    with opener.open(Place(path)) as file:
        is_parquet = _ending(path) == ".parquet"
        columns, rows = (_open_parquet if is_parquet else _open_text)(path, file, source, remarks)
        is_joined = columns.picture == KEY and not source.caption_columns
        by_line = source.caption_lines == "alternatives"
        folder = _folder(path)
        table = _Table(path, folder, _basename(folder), columns, identity, is_joined, by_line, opener)
        for found in _entries(table, rows):
            if isinstance(found, Entry):
                yield found
            else:
                remarks.problems.append(found)


def _open_parquet(path: str, file: BinaryIO, source: Source, remarks: Remarks) -> tuple[Columns, Iterator[Row]]:
    parquet = open_parquet(file)
    columns = find_columns(public_name(path), parquet_kinds(parquet), source, remarks)
    names = dict.fromkeys((columns.picture, *columns.captions, *filter(None, [columns.mask])))
    return columns, read_parquet(parquet, path, tuple(names))


def _open_text(path: str, file: BinaryIO, source: Source, remarks: Remarks) -> tuple[Columns, Iterator[Row]]:
    """What columns there are is told by the first rows: each row may have others."""
    readers: dict[str, Callable[[BinaryIO], Iterator[Row]]] = {
        ".csv": read_csv,
        ".tsv": lambda tabbed: read_csv(tabbed, "\t"),
        ".json": read_json,
    }
    rows = readers.get(_ending(path), read_json_lines)(file)
    first = list(islice(rows, _PEEK_ROWS))
    names = dict.fromkeys(name for _, cells in first if isinstance(cells, dict) for name in cells)
    if not names:
        raise BadTable(f"has no row that can be used; the first one {first[0][1] or 'is empty'}" if first else "has no rows")
    return find_columns(public_name(path), dict.fromkeys(names, "any"), source, remarks), chain(first, rows)


def _entries(table: _Table, rows: Iterator[Row]) -> Iterator[Entry | tuple[str, str]]:
    """An entry or a problem for each row. Servers are asked about several URLs at once."""

    def read(row: Row) -> Entry | tuple[str, str]:
        number, cells = row
        if isinstance(cells, str):
            return table.label(number), cells
        try:
            return _entry(table, cells)
        except (_BadCell, BadCaption) as error:
            return table.label(number), str(error)

    first = list(islice(rows, _PEEK_ROWS))
    rows = chain(first, rows)
    if not any(isinstance(cells, dict) and is_url(_join(table.folder, str(cells.get(table.columns.picture)))) for _, cells in first):
        yield from map(read, rows)
        return
    with ThreadPoolExecutor(_URL_THREADS) as threads:
        while window := list(islice(rows, 8 * _URL_THREADS)):
            yield from threads.map(read, window)


# Rows


class _BadCell(Exception):
    """A row that cannot be used. The text is the reason, and reads well after its number."""


def _entry(table: _Table, cells: Mapping[str, Any]) -> Entry:
    columns = table.columns
    picture, identity, name = _picture(table, cells.get(columns.picture), columns.picture)
    captions = _joined_captions(table, cells) if table.is_joined else _captions(table, cells)
    if columns.mask and (cell := cells.get(columns.mask)) not in (None, ""):
        mask, mask_identity, _ = _picture(table, cell, columns.mask)
        return Entry(name, picture, identity, captions, mask=mask, mask_identity=mask_identity)
    return Entry(name, picture, identity, captions)


def _picture(table: _Table, cell: Any, column: str) -> tuple[Place, Identity, str]:
    """Where a cell's picture lies, and its name. Raises _BadCell."""
    if isinstance(cell, Cell):
        name = table.label(cell.place.start)
        return cell.place, table.identity, f"{name} ({_shown(cell.name)})" if cell.name else name
    if not isinstance(cell, str):
        raise _BadCell(f"has {kind_of(cell)} as `{column}`, where the path or URL of a picture belongs")
    if not cell.strip():
        raise _BadCell(f"has nothing as {f'`{column}`' if column else 'its name'}, where the path or URL of a picture belongs")
    path, identity = _locate(table, cell)
    return Place(path), identity, _shown(cell) if path == cell else printable(f"{table.folder_name}/{cell}")


def _locate(table: _Table, cell: str) -> tuple[str, Identity]:
    """The file that a cell names, as it is written, or else as Windows and sd-scripts write it. Raises _BadCell."""
    path = _join(table.folder, cell)
    try:
        return path, table.opener.identity(path)
    except (OSError, StorageError, ValueError) as error:
        for other in _other_paths(table, cell) if not is_url(path) and "\0" not in cell else ():
            if Path(other).is_file():
                return other, table.opener.identity(other)
        reason = error.message if isinstance(error, StorageError) else getattr(error, "strerror", None) or str(error)
        raise _BadCell(f"names {_shown(path)[:1000]}, which cannot be opened: {reason}") from error


def _other_paths(table: _Table, cell: str) -> Iterator[str]:
    path = _join(table.folder, cell.replace("\\", "/"))
    if "\\" in cell:
        yield path
    if table.columns.picture == KEY:
        yield from (f"{path}{side}" for side in _SIDES)


def _captions(table: _Table, cells: Mapping[str, Any]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for column in table.columns.captions:
        for text in _texts(table, column, cells.get(column)):
            found[text] = None
    return tuple(found)


def _joined_captions(table: _Table, cells: Mapping[str, Any]) -> tuple[str, ...]:
    """Caption and tags as sd-scripts joins them; if each line is a caption, the tags end each of them."""
    tags = ", ".join(_texts(table, "tags", cells.get("tags")))
    captions = _texts(table, "caption", cells.get("caption")) or [tags]
    joined = (f"{caption}, {tags}" if tags and caption is not tags else caption for caption in captions)
    return tuple(dict.fromkeys(text for text in joined if text))


def _texts(table: _Table, column: str, cell: Any) -> list[str]:
    """The captions in a cell, without blank ones. Raises _BadCell and BadCaption."""
    if cell is None:
        return []
    texts = cell if isinstance(cell, list) else [cell]
    for text in texts:
        if not isinstance(text, str):
            raise _BadCell(f"has {kind_of(text)} {'in the list of' if texts is cell else 'as'} `{column}`, where a text belongs")
    if isinstance(cell, list) and column.strip().lower() in _TAGS:
        texts = [", ".join(tag.strip() for tag in texts if tag.strip())]
    elif table.by_line:
        texts = [line for text in texts for line in text.splitlines()]
    return [cleaned for text in texts if (cleaned := clean_caption(text))]


# Paths


def _ending(path: str) -> str:
    return extension(public_name(path))


def _folder(path: str) -> str:
    return path.rpartition("/")[0] if is_url(path) else str(Path(path).absolute().parent)


def _basename(path: str) -> str:
    return public_name(path).rpartition("/")[2]


def _join(folder: str, cell: str) -> str:
    if "://" in cell and is_url(cell):
        return cell
    return cell if cell.startswith("/") and not is_url(folder) else f"{folder}/{cell}"


def _shown(path: str) -> str:
    return printable(public_name(path))
