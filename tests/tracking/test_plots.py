import io

import numpy as np
import pytest
from PIL import Image

from aquatint.tracking import plots
from aquatint.tracking.plots import Draws, Grid, Levels, Memory, Noise, Weights, percent_by_range
from aquatint.tracking.tensorboard import png_size_hw

T = np.arange(1000) / 999
EVEN = np.full(1000, 1e-3)
LEVELS = Levels("levels", 1 - T, T.clip(min=1e-3))
WEIGHTS = Weights("weights", np.ones(1000), 1 + T, EVEN)
DRAWN = np.arange(64).reshape(16, 4) * 15
GRID = Grid("grid", np.array([999.0, 500.0, 10.0]), np.array([np.inf, 2.0, 0.1]))
PAGES = {
    "schedule": lambda: plots.plot_schedule("title", [LEVELS]),
    "weights": lambda: plots.plot_weights("title", [WEIGHTS]),
    "timesteps": lambda: plots.plot_timesteps("title", [Draws("all", EVEN, DRAWN)]),
    "sampling": lambda: plots.plot_sampling("title", [GRID]),
    "noise": lambda: plots.plot_noise("title", [Noise("noise", np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.5, 0.3]))]),
    "learning_rate": lambda: plots.plot_learning_rate("title", 1e-5 * T, [Memory("decay 0.9", 7 * T)]),
}


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_a_white_png_of_a_readable_size_and_the_same_every_time(name):
    png = PAGES[name]()
    height, width = png_size_hw(png)
    assert width == 860
    assert 300 <= height <= 1000
    assert len(png) < 100_000
    picture = pixels(png)
    assert (picture[0] == 255).all()
    assert (picture == (59, 110, 165)).all(axis=2).sum() > 50, "nothing is drawn in the first colour"
    assert PAGES[name]() == png


def test_matplotlib_keeps_its_backend():
    import matplotlib

    before = matplotlib.rcParams._get("backend")
    PAGES["sampling"]()
    assert matplotlib.rcParams._get("backend") is before


def test_shares_of_ten_ranges_are_percents_of_the_whole():
    values = np.zeros(1000)
    values[[0, 99, 100, 999]] = 1, 1, 1, 5
    assert percent_by_range(values).tolist() == [25, 12.5, 0, 0, 0, 0, 0, 0, 0, 62.5]
    table = Weights("", T * 2, T, EVEN)
    assert table.drawn_share == pytest.approx([10] * 10)
    assert table.weight_share.sum() == pytest.approx(100)
    assert table.weight_share[-1] == pytest.approx(100 * T[900:].sum() / T.sum())


def test_a_ratio_of_nothing_to_noise_is_minus_infinity():
    levels = Levels("", np.array([0.1, 0.0]), np.array([1.0, 1.0]))
    assert levels.decibels.tolist() == [-20, -np.inf]


def test_a_timestep_that_towers_over_its_neighbours_is_drawn_apart():
    spiked = 0.99 * EVEN
    spiked[999] += 0.01
    flat, tall = (pixels(plots.plot_timesteps("", [Draws("all", density)])) for density in (EVEN, spiked))
    assert flat.shape == tall.shape
    np.testing.assert_array_equal(plots._without_spike(EVEN), EVEN)
    np.testing.assert_allclose(plots._without_spike(spiked), 0.99 * EVEN)
    only = np.zeros(1000)
    only[0] = 1
    np.testing.assert_array_equal(plots._without_spike(only), only)


@pytest.mark.parametrize(
    "page",
    [
        lambda: plots.plot_schedule("one " * 100, [LEVELS, LEVELS]),
        lambda: plots.plot_weights("", [WEIGHTS, Weights("zeros", np.where(T > 0.9, 0, 1), np.where(T > 0.9, 0, 1), EVEN)]),
        lambda: plots.plot_timesteps("", [Draws("one", EVEN, DRAWN[:1, :1]), Draws("other", EVEN)]),
        lambda: plots.plot_sampling("", [GRID, Grid("one step", np.array([999.0]), np.array([14.6]))]),
        lambda: plots.plot_learning_rate("", np.zeros(1), []),
        lambda: plots.plot_learning_rate("", np.ones(2), [Memory("a", np.ones(2)), Memory("b", np.ones(2))]),
    ],
    ids=["long title", "weights of zero", "one draw", "one sampling step", "a rate of zero", "two averages"],
)
def test_odd_tables_can_be_drawn(page):
    assert png_size_hw(page())[1] == 860
