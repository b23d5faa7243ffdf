import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.duration import Duration
from aquatint.planning.schedule import count, expected_held_out, number, plan_steps


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 16), st.integers(1, 50))
def test_epochs_become_the_least_number_of_steps_that_reaches_them(samples, batch_size, accumulation_steps, epochs):
    plan = plan_steps(samples, batch_size, accumulation_steps, Duration(epochs, "epochs"))
    assert plan.steps == math.ceil(epochs * samples / (batch_size * accumulation_steps))
    assert plan.samples >= epochs * samples > plan.samples - plan.samples_per_step
    assert plan.epochs == pytest.approx(plan.steps / plan.steps_per_epoch)


@pytest.mark.parametrize(
    ("length", "steps", "epochs"),
    [("1000 steps", 1000, 8000 / 612), ("10 epochs", 765, 10), ("1 epoch", 77, 616 / 612), ("20000 samples", 2500, 20000 / 612)],
)
def test_each_unit_of_length_gives_its_steps(length, steps, epochs):
    plan = plan_steps(612, 4, 2, Duration.parse(length))
    assert plan.steps == steps
    assert plan.epochs == pytest.approx(epochs)


def test_the_arithmetic_is_written_out():
    assert plan_steps(612, 4, 2, Duration.parse("10 epochs")).lines() == (
        "a step is a batch of 4 × 2 accumulation steps = 8 samples",
        "an epoch is 612 samples ÷ 8 = 76.5 steps",
        'the length "10 epochs" = 10 × 612 ÷ 8, rounded up: 765 steps, 6,120 samples, 10 epochs',
    )
    assert plan_steps(612, 1, 1, Duration.parse("20000 samples")).lines() == (
        "a step is a batch of 1 × 1 accumulation step = 1 sample",
        "an epoch is 612 samples ÷ 1 = 612 steps",
        'the length "20000 samples" = 20,000 ÷ 1, rounded up: 20,000 steps, 20,000 samples, 32.68 epochs',
    )
    assert plan_steps(100, 2, 1, Duration.parse("1 step")).lines()[2] == 'the length "1 step": 1 step, 2 samples, 0.02 epochs'


def test_a_time_cannot_be_planned():
    with pytest.raises(ValueError, match="cannot be turned into samples or steps"):
        plan_steps(10, 1, 1, Duration.parse("30 min"))


def test_an_empty_epoch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        plan_steps(0, 1, 1, Duration.parse("1 epoch"))


@pytest.mark.parametrize(
    ("num_pictures", "share", "expected"),
    [(1000, 0.02, 20), (10_000, 0.02, 64), (10, 0.02, 1), (1, 0.02, 0), (0, 0.02, 0), (1000, 0.0, 0), (4, 0.5, 2)],
)
def test_the_number_of_held_out_pictures_is_estimated(num_pictures, share, expected):
    assert expected_held_out(num_pictures, share=share, max_pictures=64) == expected


def test_counts_and_numbers_read_well():
    assert [count(1, "step"), count(0, "step"), count(1200, "step")] == ["1 step", "0 steps", "1,200 steps"]
    assert [number(2.0), number(76.5), number(1 / 3), number(100.0), number(12345.678)] == ["2", "76.5", "0.33", "100", "12,345.68"]
