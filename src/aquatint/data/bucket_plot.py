"""The buckets as one picture: how full they are, what is cropped, and what is enlarged."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aquatint.data.bucket_sets import Floats
from aquatint.data.buckets import BucketRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, FAINT, SMALLER, ENLARGED = "#2b2b33", "#77777f", "#d9d9e0", "#3b6ea5", "#c8553d"
TIER_COLORS = ("#3b6ea5", "#7fa7cf", "#b9cfe6", "#dbe6f2")
_MAX_LABELS, _MAX_LEVEL_LABELS = 60, 12  # shapes that can be told apart below the bars, and those written without a slant
_BINS = 40


def plot_buckets(rows: Sequence[BucketRow], cropped: Floats, scale: Floats, title: str = "") -> bytes:
    """A PNG of the report's rows, and of the cropped share and the resize factor of each picture, both (n,)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(11, 7.4), dpi=120, layout=layout, facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    _draw_occupancy(figure.add_subplot(grid[0, :]), rows, title)
    _draw_cropped(figure.add_subplot(grid[1, 0]), cropped)
    _draw_scale(figure.add_subplot(grid[1, 1]), scale)
    return _png(figure, FigureCanvasAgg)


def _png(figure: Figure, canvas: type) -> bytes:
    file = io.BytesIO()
    canvas(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _draw_occupancy(panel: Axes, rows: Sequence[BucketRow], title: str) -> None:
    """A bar per bucket, from tall to wide; buckets of smaller tiers further right, in paler colours."""
    tiers = sorted({row.tier_px for row in rows}, reverse=True)
    order = sorted(rows, key=lambda row: (-row.tier_px, row.width_px / row.height_px))
    counts = np.array([row.num_pictures for row in order])
    places = np.arange(len(order)) + 0.8 * np.array([tiers.index(row.tier_px) for row in order], dtype=np.float64)
    for number, tier in enumerate(tiers):
        inside = np.array([row.tier_px == tier for row in order])
        label = f"tier of {tier} px: {counts[inside].sum():,} pictures"
        panel.bar(places[inside], counts[inside], width=0.82, color=TIER_COLORS[min(number, 3)], label=label)
    _dress(panel)
    _label_shapes(panel, order, places)
    panel.set_ylabel("pictures", color=INK, fontsize=9)
    if len(tiers) > 1:
        panel.legend(fontsize=8.5, labelcolor=INK, loc="upper right", facecolor="white", edgecolor="none", framealpha=1)
    panel.set_title(title or "Pictures per bucket", loc="left", color=INK, fontsize=12, fontweight="bold")
    if len(counts) > 1:
        text = f"{counts.sum():,} pictures in {len(rows)} buckets, the smallest with {counts.min():,}"
        panel.set_title(text, loc="right", color=QUIET, fontsize=9)


def _label_shapes(panel: Axes, order: Sequence[BucketRow], places: Floats) -> None:
    """Width × height below the bars, as many as can be read: the fullest of each neighbourhood."""
    every = max(1, -(-len(order) // _MAX_LABELS))
    groups = [range(start, min(start + every, len(order))) for start in range(0, len(order), every)]
    shown = [max(group, key=lambda index: order[index].num_pictures) for group in groups]
    slant: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(shown) > _MAX_LEVEL_LABELS else {}
    panel.set_xticks(places[shown], [f"{order[index].width_px}×{order[index].height_px}" for index in shown], **slant)
    panel.tick_params(axis="x", labelsize=7.5, pad=3)
    middle, reach = len(order) / 2 - 0.5, max(len(order), _MAX_LEVEL_LABELS) / 2  # a few bars stand in the middle, no wider than many
    panel.set_xlim(middle - reach, max(middle + reach, places.max(initial=0.0) + 0.5))


def _draw_cropped(panel: Axes, cropped: Floats) -> None:
    percent = 100 * np.asarray(cropped)
    top = max(2.0, float(np.ceil(np.quantile(percent, 0.995)))) if len(percent) else 2.0
    panel.hist(np.minimum(percent, top), bins=_BINS, range=(0, top), color=SMALLER, rwidth=0.88)
    _dress(panel)
    rest = int((percent > top).sum())
    panel.set_title("Cropped area", loc="left", color=INK, fontsize=11, fontweight="bold")
    panel.set_xlabel(f"% of the picture; the last bar has {rest:,} with more" if rest else "% of the picture", color=INK, fontsize=9)
    panel.set_ylabel("pictures", color=INK, fontsize=9)
    panel.set_ylim(0, panel.get_ylim()[1] * 1.08)
    if len(percent):
        mean, most = percent.mean(), np.quantile(percent, 0.95)
        for value, name in ((mean, "mean"), (most, "95 %")):
            panel.axvline(value, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            if value == mean or most - mean > 0.1 * top:
                panel.text(value, 0.985, f" {name}", transform=panel.get_xaxis_transform(), color=INK, fontsize=8, va="top")
        text = f"mean {mean:.1f} %, 95 % of them up to {most:.1f} %, all up to {percent.max():.1f} %"
        panel.set_title(text, loc="right", color=QUIET, fontsize=8.5)


def _draw_scale(panel: Axes, scale: Floats) -> None:
    """Resize factors on a logarithmic axis, with those above 1 in another colour."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    factors = np.asarray(scale)
    low, high = (float(factors.min()), float(factors.max())) if len(factors) else (0.5, 1.0)
    low, high = min(low, 0.5), max(high, 1.0)
    width = np.log(high / low) / _BINS
    steps = np.exp(width * np.arange(np.floor(np.log(low) / width), np.ceil(np.log(high) / width) + 1))  # no bar on both sides of 1
    for part, color in ((factors[factors <= 1], SMALLER), (factors[factors > 1], ENLARGED)):
        panel.hist(part, bins=steps, color=color, rwidth=0.88)
    _dress(panel)
    panel.set_xscale("log")
    panel.axvline(1, color=INK, linewidth=1)
    ticks = [tick for tick in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32) if low / 1.05 <= tick <= high * 1.05]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×" if value >= 1 else f"1/{round(1 / value)}"))
    panel.set_title("Resized by", loc="left", color=INK, fontsize=11, fontweight="bold")
    panel.set_xlabel("pixels after / pixels before, along a side", color=INK, fontsize=9)
    share = (factors > 1).mean() if len(factors) else 0.0
    text = f"{share:.1%} enlarged, up to {factors.max():.2f}×" if share else "none is enlarged"
    panel.set_title(text, loc="right", color=ENLARGED if share else QUIET, fontsize=8.5)


def _dress(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.tick_params(colors=INK, length=0, labelsize=8.5)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
