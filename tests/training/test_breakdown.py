import math

import pytest

from aquatint.training.breakdown import Breakdown, band, choose_breakdown
from aquatint.training.state import TrainState
from aquatint.training.step import StepReport

REPORT = StepReport(
    loss=1.0, gradient_norm=1.0, learning_rate=0.1, finite=True, samples=3, names=("a", "b", "c"),
    losses=(0.5, 0.25, math.nan), timesteps=(0, 999, 500), sources=(0, 2, 2), sizes_hw=((152, 104), (152, 104), (128, 128)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("timestep", "name"), [(0, "t000_249"), (249, "t000_249"), (250, "t250_499"), (749, "t500_749"), (999, "t750_999")]
)
def test_there_are_four_bands_of_timesteps(timestep, name):
    assert band(timestep) == name


def test_a_sample_belongs_to_its_noise_level_size_and_source_and_one_that_is_not_finite_to_none():
    assert list(Breakdown(by_size=True, by_source=True).of(REPORT)) == [
        ("t000_249", 0.5), ("832x1216", 0.5), ("source_0", 0.5), ("t750_999", 0.25), ("832x1216", 0.25), ("source_2", 0.25),
    ]  # fmt: skip
    assert list(Breakdown(by_size=False, by_source=False).of(REPORT)) == [("t000_249", 0.5), ("t750_999", 0.25)]


def test_sizes_and_sources_are_told_apart_where_there_are_several_but_not_too_many():
    assert choose_breakdown(1, 1) == Breakdown(by_size=False, by_source=False)
    assert choose_breakdown(2, 16) == Breakdown(by_size=True, by_source=True)
    assert choose_breakdown(17, 2) == Breakdown(by_size=False, by_source=True)


def test_the_means_are_over_all_samples_since_the_last_row():
    state = TrainState()
    for _ in range(2):
        state = state.advance(samples=3, loss=1.0, finite=True, parts=Breakdown(by_size=True, by_source=False).of(REPORT))
    assert state.mean_losses() == {"loss": 1.0, "loss_832x1216": 0.375, "loss_t000_249": 0.5, "loss_t750_999": 0.25}
    assert state.logged().mean_losses() == {}
