import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.duration import PATTERN, Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("500 steps", 500, "steps"), ("1 epoch", 1, "epochs"), ("0.5 epochs", 0.5, "epochs"), ("30 min", 1800, "seconds"),
     ("2h", 7200, "seconds"), ("1 hour", 3600, "seconds"), (" 20000 samples ", 20000, "samples")],
)  # fmt: skip
def test_durations_are_a_number_and_a_unit(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)
    assert re.search(PATTERN, text)


@pytest.mark.parametrize("text", ["500", 500, "steps", "-1 steps", "1e3 steps", "5 parsecs", "", None, True, "1 step 2 steps", "٣ steps"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        Duration.parse(text)


def test_a_number_too_large_to_hold_is_refused():
    with pytest.raises(ValueError, match="too long"):
        Duration.parse("9" * 400 + " steps")


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1e15), st.sampled_from(["steps", "epochs", "samples", "seconds"]))
def test_as_text_and_back_nothing_is_lost(value, unit):
    assert Duration.parse(str(Duration(value, unit))) == Duration(value, unit)


def test_large_numbers_are_written_out():
    assert str(Duration(1234567, "steps")) == "1234567 steps"
    assert str(Duration(1, "epochs")) == "1 epoch"
    assert str(Duration(90, "seconds")) == "90 s"


def test_steps_are_rounded_up_and_times_are_no_steps():
    sizes = {"samples_per_step": 4, "samples_per_epoch": 10}
    assert Duration(2, "epochs").in_steps(**sizes) == 5
    assert Duration(9, "samples").in_steps(**sizes) == 3
    assert Duration(7, "steps").in_steps(**sizes) == 7
    with pytest.raises(ValueError, match="time"):
        Duration(60, "seconds").in_steps(**sizes)


def test_samples_are_not_rounded():
    sizes = {"samples_per_step": 4, "samples_per_epoch": 10}
    assert Duration(0.5, "epochs").in_samples(**sizes) == 5
    assert Duration(9, "samples").in_samples(**sizes) == 9
    assert Duration(2.5, "steps").in_samples(**sizes) == 10
