from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.optim.lr import learning_rate_factor


def factors(steps, schedule="cosine", warmup_steps=10, total_steps=110, end_factor=0.0):
    settings = {"schedule": schedule, "warmup_steps": warmup_steps, "total_steps": total_steps, "end_factor": end_factor}
    return [learning_rate_factor(step, **settings) for step in steps]


def test_methods_10_cosine_matches_its_vector():
    assert factors([0, 5, 10, 60, 110]) == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)


def test_methods_10_inverse_sqrt_matches_its_vector():
    steps = [70_000, 140_000, 280_000]
    found = [
        learning_rate_factor(step, schedule="inverse_sqrt", warmup_steps=10, total_steps=0, end_factor=0.0, reference_steps=70_000)
        for step in steps
    ]
    assert found == pytest.approx([1, 0.70710678, 0.5])


def test_linear_falls_on_a_line():
    assert factors([10, 35, 60, 85, 110], "linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-12)


def test_constant_stays_at_the_peak_after_the_warm_up():
    assert factors([0, 5, 10, 60, 110, 1000], "constant", end_factor=0.3) == [0, 0.5, 1, 1, 1, 1]


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in ("constant", "cosine", "linear"):
        assert factors([0], schedule, warmup_steps=0) == [1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_end_factor_is_reached_and_kept(schedule):
    assert factors([110, 111, 10_000], schedule, end_factor=0.1) == pytest.approx([0.1] * 3)
    assert factors([60], schedule, end_factor=0.1) == pytest.approx([0.55])


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    assert factors(range(4), warmup_steps=100, total_steps=4) == [0, 0.01, 0.02, 0.03]


def test_a_run_that_ends_with_its_warm_up_is_no_division_by_zero():
    assert factors([9, 10, 11], warmup_steps=10, total_steps=10) == [0.9, 1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup_steps=st.integers(0, 50),
    total_steps=st.integers(1, 200),
    end_factor=st.floats(0, 1),
)
def test_factor_stays_within_0_and_1_and_never_rises_after_the_warm_up(schedule, warmup_steps, total_steps, end_factor):
    made = factors(range(250), schedule, warmup_steps, total_steps, end_factor)
    assert all(0 <= factor <= 1 + 1e-12 for factor in made)
    after = made[warmup_steps:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
