"""Rows of Parquet tables, a row group at a time. Columns of pictures are not read: a cell says where its picture lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from aquatint.data.places import Place
from aquatint.data.sources.columns import Kind
from aquatint.data.sources.text_rows import BadTable, Row

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 4096
_CHECKED_ROWS = 16  # pictures at once, in the rare table that has to be asked which cells hold one


@dataclass(frozen=True)
class Cell:
    """A picture in a table. `name` is what the table calls it, or empty."""

    place: Place
    name: str = ""


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """Raises BadTable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name or text that is not UTF-8
        raise BadTable(f"is not Parquet that can be read: {_first_line(error)}") from error


def parquet_kinds(parquet: pq.ParquetFile) -> dict[str, Kind]:
    """What each column holds, by name. Raises BadTable if a name stands twice."""
    names = parquet.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadTable(f"has two columns of the name {twice[0]!r}")
    return {field.name: _kind(field.type) for field in parquet.schema_arrow}


def _kind(kind: pa.DataType) -> Kind:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind):
        return "text"
    if _is_bytes(kind) or (types.is_struct(kind) and _is_bytes_in_struct(kind)):
        return "bytes"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "texts" if _kind(kind.value_type) == "text" else "other"
    return "other"


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind))


def _is_bytes_in_struct(kind: pa.DataType) -> bool:
    """Whether this is a picture as Hugging Face's datasets store it: a struct of bytes and path."""
    index = kind.get_field_index("bytes")
    return index >= 0 and _is_bytes(kind.field(index).type)


def read_parquet(parquet: pq.ParquetFile, path: str, names: Sequence[str]) -> Iterator[Row]:
    """Cells of the columns in `names`, with rows counted from 0; pictures are Cells. Raises BadTable where the file is broken."""
    import pyarrow as pa

    kinds = parquet_kinds(parquet)
    pictures = [name for name in names if kinds[name] == "bytes"]
    structs = [name for name in pictures if pa.types.is_struct(parquet.schema_arrow.field(name).type)]
    with_path = [name for name in structs if parquet.schema_arrow.field(name).type.get_field_index("path") >= 0]
    leaves = [*(name for name in names if name not in pictures), *(f"{name}.path" for name in with_path)]
    row = 0
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        try:
            filled = {name: _filled(parquet, group, f"{name}.bytes" if name in structs else name) for name in pictures}
            start = row
            for num_rows, columns in _batches(parquet, group, leaves):
                yield from _rows(path, row, range(start, start + num_rows), columns, filled)
                start += num_rows
            _check_count(start - row, end - row)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name or text that is not UTF-8
            raise BadTable(f"is broken in its row group {group} (from row {row} on): {_first_line(error)}") from error
        row = end


def _rows(path: str, first: int, numbers: range, columns: dict[str, list[Any]], filled: dict[str, bool | list[bool]]) -> Iterator[Row]:
    """Rows of a batch with these numbers. `filled` says which rows have a picture in a column, counted from row `first` on."""
    for index, number in enumerate(numbers):
        cells = {name: values[index] for name, values in columns.items()}
        for name, is_filled in filled.items():
            if is_filled if isinstance(is_filled, bool) else is_filled[number - first]:
                cells[name] = Cell(Place(path, number, column=name), cells.get(name) or "")
        yield number, cells


def _batches(parquet: pq.ParquetFile, group: int, leaves: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Numbers of rows, and their values by column; of a struct, its path."""
    import pyarrow.compute as pc

    if not leaves:
        yield parquet.metadata.row_group(group).num_rows, {}
        return
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(leaves), use_threads=False):
        columns = {
            name: (pc.struct_field(values, "path") if f"{name}.path" in leaves else values).to_pylist()
            for name, values in zip(batch.schema.names, batch.columns, strict=True)
        }
        yield batch.num_rows, columns


def _filled(parquet: pq.ParquetFile, group: int, leaf: str) -> bool | list[bool]:
    """Which rows of a group have something in a column: all, none, or one by one. The file's own count answers it for most."""
    metadata = parquet.metadata.row_group(group)
    columns = (metadata.column(index) for index in range(metadata.num_columns))
    statistics = next((column.statistics for column in columns if column.path_in_schema == leaf), None)
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, metadata.num_rows):
        return bool(statistics.null_count == 0)
    filled: list[bool] = []
    for batch in parquet.iter_batches(_CHECKED_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
        values = batch.column(0)
        filled += (values.field("bytes") if leaf.endswith(".bytes") and values.type.num_fields else values).is_valid().to_pylist()
    _check_count(len(filled), metadata.num_rows)
    return filled


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"it has {found:,} rows, and not {expected:,}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
