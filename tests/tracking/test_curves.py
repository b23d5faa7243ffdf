import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from aquatint.tracking.curves import plot_losses, series, smooth
from aquatint.tracking.files import MetricsFile
from aquatint.tracking.tensorboard import png_size_hw


def write_run(path, steps=200, validate_every=50):
    rng = np.random.default_rng(0)
    metrics = MetricsFile(path)
    for step in range(10, steps + 1, 10):
        metrics.log(step, {"samples": 4 * step, "loss": 0.1 + 0.1 * math.exp(-step / 60) + 0.02 * rng.standard_normal()})
        if validate_every and step % validate_every == 0:
            metrics.log(step, {"val_loss": 0.12 + 0.01 * math.exp(-step / 60)})


def test_a_run_with_validation_gives_a_picture_of_two_panels(tmp_path):
    write_run(tmp_path / "with")
    write_run(tmp_path / "without", validate_every=0)
    assert plot_losses(tmp_path / "with", tmp_path / "with.png", title="portrait")
    assert plot_losses(tmp_path / "without", tmp_path / "without.png")
    tall, flat = (png_size_hw((tmp_path / name).read_bytes())[0] for name in ("with.png", "without.png"))
    assert tall == 2 * flat


def test_the_loss_of_trained_pictures_is_drawn_beside_that_of_held_out_ones(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda panel, steps, values, **style: drawn.append((style.get("label"), np.ravel(values).tolist())))
    monkeypatch.setattr(Axes, "legend", lambda panel, **style: None)
    for step, value in enumerate((0.5, 0.4)):
        MetricsFile(tmp_path / "m").log(step, {"loss": value, "val_loss": value + 1, "train_val_loss": value + 2})
    assert plot_losses(tmp_path / "m", tmp_path / "a.png")
    assert ("trained pictures", [2.5, 2.4]) in drawn
    assert ("held-out pictures", [1.5, 1.4]) in drawn


def test_the_same_rows_give_the_same_picture(tmp_path):
    write_run(tmp_path / "m")
    for name in ("a.png", "b.png"):
        plot_losses(tmp_path / "m", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_run_without_a_loss_gives_no_picture(tmp_path):
    (tmp_path / "m").write_text('{"step": 1, "loss": null}\n')
    assert not plot_losses(tmp_path / "m", tmp_path / "a.png")
    assert not plot_losses(tmp_path / "of a run too short for a row", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0, 0.0]])
def test_very_short_and_flat_runs_can_be_drawn(tmp_path, values):
    for step, value in enumerate(values):
        MetricsFile(tmp_path / "m").log(step, {"loss": value, "val_loss": value})
    assert plot_losses(tmp_path / "m", tmp_path / "a.png")


def test_a_series_holds_the_rows_that_have_the_value(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "val_loss": 0.1}, {"step": 3, "loss": None}, {"step": 4, "loss": 1}]
    steps, values = series(rows, "loss")
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [0.5, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.floats(0.1, 20))
def test_smoothing_keeps_the_length_and_stays_within_the_values(values, width):
    values = np.asarray(values)
    smoothed = smooth(values, width)
    assert smoothed.shape == values.shape
    assert smoothed.min() >= values.min() - 1e-9
    assert smoothed.max() <= values.max() + 1e-9


def test_smoothing_leaves_a_straight_line_straight_away_from_the_ends():
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line, 3)[10:-10], line[10:-10])


def test_smoothing_calms_noise():
    noise = np.random.default_rng(1).standard_normal(1000)
    assert smooth(noise, 10).std() < 0.25 * noise.std()
