"""The losses of a run as one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aquatint.storage import write_bytes
from aquatint.tracking.files import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, TRAINING, VALIDATION, KNOWN = "#2b2b33", "#d9d9e0", "#3b6ea5", "#c8553d", "#8fb3d6"
Series = tuple[np.ndarray, np.ndarray]


def plot_losses(
    metrics_path: Path, png_path: Path, *, title: str = "", loss: str = "loss", validation: str = "val_loss", known: str = "train_val_loss"
) -> bool:
    """Draws `loss`, `validation` and `known` over the steps into a PNG. False, and no picture, if there is no loss to draw yet.

    The validation loss gets a panel of its own: it moves by far less than the training loss scatters, and the two are
    not on one scale when the training loss is weighted. `known`, the loss of trained pictures that are measured like those
    held out, is on its scale and beside it. Raises StorageError.
    """
    rows = read_rows(metrics_path) if metrics_path.exists() else []  # a short run may end before its first row
    training, held_out, trained = (series(rows, name) for name in (loss, validation, known))
    if not len(training[0]):
        return False
    write_bytes(png_path, _draw(training, held_out, trained, title))
    return True


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Steps (n,) and values (n,), float64, of the rows that have a number under `name`."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """A running mean with a bell-shaped window of standard deviation `width` (in rows), centred, so that nothing lags.

    Near the ends only the rows that exist are averaged.
    """
    reach = int(3 * width)
    if reach < 1 or len(values) < 3:
        return values
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total, weight = (np.convolve(x, kernel, mode="full")[reach : reach + len(values)] for x in (values, np.ones_like(values)))
    return total / weight


def _draw(training: Series, held_out: Series, known: Series, title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if len(held_out[0]) else 1
    figure = Figure(figsize=(9, 3.4 * panels), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    _draw_training(axes[0], *training)
    if panels == 2:
        _draw_validation(axes[1], held_out, known)
    for panel in axes:
        _dress(panel)
    axes[-1].set_xlabel("step", color=INK)
    figure.align_ylabels()
    axes[0].set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _draw_training(panel: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    panel.plot(steps, values, color=TRAINING, alpha=0.25, linewidth=0.8)
    panel.plot(steps, smooth(values, len(values) / 60), color=TRAINING, linewidth=2.0, solid_capstyle="round")
    panel.set_ylabel("training loss", color=INK)
    low, high = np.quantile(values, (0.005, 0.995))  # one odd row must not flatten the curve
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    panel.set_ylim(low - room, high + room)


def _draw_validation(panel: Axes, held_out: Series, known: Series) -> None:
    steps, values = held_out
    if len(known[0]):
        panel.plot(*known, color=KNOWN, linewidth=1.6, marker="o", markersize=4, label="trained pictures")
    panel.plot(steps, values, color=VALIDATION, linewidth=1.6, marker="o", markersize=4, label="held-out pictures")
    if len(known[0]):
        panel.legend(frameon=False, fontsize=9, labelcolor=INK)
    best = int(np.argmin(values))
    panel.plot(steps[best], values[best], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=VALIDATION, markeredgewidth=1.5)
    note = f"lowest: {values[best]:.4g} at step {steps[best]:,.0f}"
    panel.set_ylabel("validation loss", color=INK)
    panel.set_title(note, loc="right", color=VALIDATION, fontsize=9)
    panel.margins(y=0.18)


def _dress(panel: Axes) -> None:
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.tick_params(colors=INK, length=0, labelsize=9)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else "")
    panel.margins(x=0.01)
