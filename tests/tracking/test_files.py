import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.errors import StorageError
from aquatint.tracking.files import MetricsFile, read_rows, truncate_after

ROWS = [
    (10, {"samples": 40, "loss": 0.1}),
    (20, {"samples": 80, "loss": 0.30000000000000004}),
    (20, {"val_loss": 0.2}),
    (30, {"loss": 1e-7}),
]


def write(path, rows):
    tracker = MetricsFile(path)
    for step, values in rows:
        tracker.log(step, values)
    tracker.close()


def test_a_row_is_one_json_object_per_line_with_the_step_first(tmp_path):
    write(tmp_path / "metrics.jsonl", ROWS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 10, "samples": 40, "loss": 0.1}'
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 20, 30]


@settings(max_examples=30, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_comes_back_exactly(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    MetricsFile(path).log(1, {"loss": value})
    assert read_rows(path) == [{"step": 1, "loss": value}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null_so_that_the_line_stays_json(tmp_path, value):
    MetricsFile(tmp_path / "m").log(1, {"loss": value})
    assert json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_pictures_leave_no_row(tmp_path):
    MetricsFile(tmp_path / "m").image(1, "samples", tmp_path / "a.png")
    assert not (tmp_path / "m").exists()


def test_truncating_drops_later_steps_and_leaves_the_rest_byte_for_byte(tmp_path):
    path, expected = tmp_path / "a", tmp_path / "b"
    write(path, ROWS)
    write(expected, ROWS[:3])
    assert truncate_after(path, 20) == 1
    assert path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_truncating_drops_a_line_that_a_crash_cut_short(tmp_path, cut):
    path = tmp_path / "a"
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert truncate_after(path, 1000) == 1
    MetricsFile(path).log(*ROWS[3])
    write(tmp_path / "b", ROWS)
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_a_resumed_file_is_the_same_as_one_written_straight_through(tmp_path):
    straight, resumed = tmp_path / "a", tmp_path / "b"
    write(straight, ROWS)
    write(resumed, ROWS)
    truncate_after(resumed, 10)
    write(resumed, ROWS[1:])
    assert resumed.read_bytes() == straight.read_bytes()


def test_truncating_rewrites_nothing_when_nothing_has_to_go(tmp_path):
    path = tmp_path / "a"
    write(path, ROWS)
    before = path.stat().st_ino
    assert truncate_after(path, 30) == 0
    assert path.stat().st_ino == before


def test_truncating_a_file_that_is_not_there_is_fine(tmp_path):
    assert truncate_after(tmp_path / "none", 5) == 0


def test_lines_that_are_not_rows_are_left_out(tmp_path):
    path = tmp_path / "a"
    path.write_text('{"step": 1}\nnonsense\n[1]\n{"loss": 2}\n\n{"step": 2}\n{"step": 3}')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert truncate_after(path, 2) == 5
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_reading_a_file_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="could not read"):
        read_rows(tmp_path / "none")
