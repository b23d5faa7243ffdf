"""Cells of Parquet tables, opened as files."""

from __future__ import annotations

import errno
import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aquatint.errors import UsageError

MAX_BYTES = 512 << 20  # of decoded row groups; the one in use stays even if it alone is larger


class _Table(NamedTuple):
    """An open table: what its end says, and the first row of each row group, with the number of rows last."""

    path: str
    version: tuple[int, int, int]
    metadata: Any
    firsts: list[int]


class _Group:
    """A column of a row group, decoded by whoever needs it first while the others wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cells: Any = None
        self.num_bytes = 0


class Cells:
    """Opens cells. Picklable, and any number of threads may share one.

    A row group is the least that can be decoded, so the last few stay in memory: rows should be asked for in order.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._groups: OrderedDict[tuple[str, tuple[int, int, int], int, str], _Group] = OrderedDict()

    def __reduce__(self) -> tuple[type[Cells], tuple[int]]:
        return Cells, (self._max_bytes,)

    def open(self, path: str, column: str, row: int) -> BinaryIO:
        """The bytes of a cell: binary, or a struct with the field `bytes`, as Hugging Face writes pictures. Raises OSError."""
        table = self._table(path)
        if not 0 <= row < table.firsts[-1]:
            raise OSError(errno.EIO, f"the table that holds it has no row {row}", path)
        number = bisect_right(table.firsts, row) - 1
        value = self._group(table, number, column)[row - table.firsts[number]].as_py()
        if not isinstance(value, bytes):
            what = "is empty" if value is None else "does not hold bytes"
            raise OSError(errno.EINVAL, f"its cell {what}", path)
        return io.BytesIO(value)

    def _table(self, path: str) -> _Table:
        status = Path(path).stat()
        version = (status.st_size, status.st_mtime_ns, status.st_ino)
        with self._lock:
            table = self._tables.get(path)
            if table is None or table.version != version:
                metadata = _call(path, lambda parquet: parquet.read_metadata(path))
                sizes = (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
                table = self._tables[path] = _Table(path, version, metadata, list(accumulate(sizes, initial=0)))
            self._tables.move_to_end(path)
            while len(self._tables) > 64:
                self._tables.popitem(last=False)
        return table

    def _group(self, table: _Table, number: int, column: str) -> Any:
        key = table.path, table.version, number, column
        with self._lock:
            group = self._groups.setdefault(key, _Group())
            self._groups.move_to_end(key)
        with group.lock:
            if group.cells is None:
                cells = _decode(table, number, column)
                group.num_bytes = cells.nbytes
                group.cells = cells
                self._make_room()
        return group.cells

    def _make_room(self) -> None:
        with self._lock:
            total = sum(group.num_bytes for group in self._groups.values())
            while total > self._max_bytes and len(self._groups) > 1:
                total -= self._groups.popitem(last=False)[1].num_bytes


def _decode(table: _Table, number: int, column: str) -> Any:
    """A column of a row group, as an Arrow array in chunks."""

    def read(parquet: Any) -> Any:
        with parquet.ParquetFile(table.path, metadata=table.metadata) as file:
            return file.read_row_group(number, columns=[column], use_threads=False)

    content = _call(table.path, read)
    if column not in content.column_names:
        raise OSError(errno.EINVAL, f"the table that holds it has no column {column!r}", table.path)
    cells = content.column(column)
    fields = {field.name: index for index, field in enumerate(cells.type)} if hasattr(cells.type, "get_field_index") else {}
    return cells.flatten()[fields["bytes"]] if "bytes" in fields else cells


def _call(path: str, action: Any) -> Any:
    """Calls `action` with pyarrow.parquet; damage becomes an OSError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path} is a Parquet table, and pyarrow is not installed", hint="pip install pyarrow") from error
    try:
        return action(parquet)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's: pyarrow's own have no number
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"the table that holds it is damaged: {reason}", path) from error
