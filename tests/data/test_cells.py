import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aquatint.data import cells as module
from aquatint.data.cells import Cells
from aquatint.data.places import Opener, Place

ROWS = [f"picture {row}".encode() * (row + 1) for row in range(25)]


def written(path, column, group_rows=10):
    pq.write_table(pa.table({"id": pa.array(range(len(column))), "image": column}), path, row_group_size=group_rows)
    return str(path)


@pytest.fixture
def table(tmp_path):
    return written(tmp_path / "a.parquet", pa.array(ROWS, pa.binary()))


def read(cells, path, row, column="image"):
    with cells.open(path, column, row) as file:
        return file.read()


def test_cells_of_all_row_groups_are_files(table):
    cells = Cells()
    assert [read(cells, table, row) for row in range(25)] == ROWS
    with Opener().open(Place(table, 24, column="image")) as file:
        assert file.seek(8) == 8
        assert file.read(2) == ROWS[24][8:10]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS, pa.large_binary()),
        pa.array([{"bytes": row, "path": f"{index}.jpg"} for index, row in enumerate(ROWS)]),
        pa.array([{"path": None, "bytes": row} for row in ROWS]),
        pa.DictionaryArray.from_arrays(pa.array(range(25), pa.int32()), pa.array(ROWS, pa.binary())),
    ],
    ids=["large", "hugging face", "other order", "dictionary"],
)
def test_cells_may_be_written_in_several_ways(tmp_path, column):
    path = written(tmp_path / "a.parquet", column)
    assert [read(Cells(), path, row) for row in (0, 9, 10, 24)] == [ROWS[row] for row in (0, 9, 10, 24)]


def test_a_column_in_a_struct_of_the_same_beginning_is_not_confused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image.bytes": [b"one"], "image": [{"bytes": b"two"}]}), path)
    assert read(Cells(), str(path), 0) == b"two"
    assert read(Cells(), str(path), 0, "image.bytes") == b"one"


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([None, b"x"], pa.binary()), "its cell is empty"),
        (pa.array([{"bytes": None, "path": "a.jpg"}]), "its cell is empty"),
        (pa.array([None, {"bytes": b"x"}]), "its cell is empty"),
        (pa.array(["text"]), "its cell does not hold bytes"),
        (pa.array([[1, 2]]), "its cell does not hold bytes"),
    ],
)
def test_a_cell_without_bytes_is_an_error(tmp_path, column, reason):
    with pytest.raises(OSError, match=reason):
        read(Cells(), written(tmp_path / "a.parquet", column), 0)


def test_rows_and_columns_that_are_not_there_are_errors(table):
    for row in (25, -1):
        with pytest.raises(OSError, match=f"has no row {row}"):
            read(Cells(), table, row)
    with pytest.raises(OSError, match="has no column 'picture'"):
        read(Cells(), table, 0, "picture")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-10], lambda data: b"PAR1" + bytes(100) + data[104:]])
def test_a_damaged_table_is_an_error(tmp_path, damage):
    path = tmp_path / "a.parquet"
    column = pa.array([bytes([row]) * 1000 for row in range(25)])
    pq.write_table(pa.table({"image": column}), path, use_dictionary=False)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match="is damaged"):
        read(Cells(), str(path), 0)


def test_a_row_group_is_decoded_once_by_however_many_threads(table, monkeypatch):
    decoded = []
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda table, number, column: decoded.append(number) or decode(table, number, column))
    cells = Cells()
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        return [read(cells, table, row) for row in range(25)]

    with ThreadPoolExecutor(8) as pool:
        assert all(result == ROWS for result in pool.map(work, range(8)))
    assert sorted(decoded) == [0, 1, 2]


def test_decoded_row_groups_stay_within_the_memory_they_may_take(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", pa.array([bytes([row]) * 1000 for row in range(100)]))
    decoded = []
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda table, number, column: decoded.append(number) or decode(table, number, column))
    cells = Cells(max_bytes=35_000)  # three groups of ten rows
    for row in (0, 10, 20, 0, 30, 0, 10, 99):
        read(cells, path, row)
        assert sum(group.num_bytes for group in cells._groups.values()) <= 35_000
    assert decoded == [0, 1, 2, 3, 1, 9]
    small = Cells(max_bytes=1)
    assert [read(small, path, row)[0] for row in (0, 99, 0)] == [0, 99, 0]


def test_a_table_that_was_replaced_is_read_again(table, tmp_path):
    cells = Cells()
    read(cells, table, 3)
    written(tmp_path / "b.parquet", pa.array([b"new"] * 25))
    (tmp_path / "b.parquet").replace(table)
    assert read(cells, table, 3) == b"new"


def test_cells_can_be_sent_to_another_process(table):
    cells = Cells(max_bytes=77)
    read(cells, table, 3)
    copy = pickle.loads(pickle.dumps(cells))
    assert copy._max_bytes == 77
    assert read(copy, table, 3) == ROWS[3]
