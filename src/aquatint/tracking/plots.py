"""What a config will do, as pictures: tables in, a PNG out.

Each takes one table or several to compare. Timesteps go from left to right, from almost clean to noise.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

INK, QUIET, FAINT, BAND = "#2b2b33", "#77777f", "#d9d9e0", "#e6e6ec"
COLORS = ("#3b6ea5", "#c8553d", "#5a8f4f", "#b5892b", "#7b5ea7", "#3f9c9c", "#9c4a78", "#77777f")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
TIMESTEP = "timestep  (left: almost clean, right: noise)"
RANGES = 10  # of timesteps, in which shares are summed
SHOWN_STEPS = 12
_WIDTH, _PANEL, _DPI, _LETTERS = 8.6, 2.9, 100, 92
_SPIKE = 3.0  # so many times as often as its neighbour: a timestep that is drawn on its own


@dataclass(frozen=True)
class Levels:
    """A noise schedule: the share of the picture and of the noise, each (1000,)."""

    name: str
    alphas: Array
    sigmas: Array

    @property
    def decibels(self) -> Array:
        """10 log10 of the signal to noise ratio, (1000,); -inf where it is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(20 * np.log10(self.alphas / self.sigmas))


@dataclass(frozen=True)
class Weights:
    """What an error counts at each timestep, and how often it is drawn, each (1000,).

    `output` is the weight of the squared error of the UNet's output, `picture` that of the picture which the output implies.
    """

    name: str
    output: Array
    picture: Array
    density: Array

    @property
    def drawn_share(self) -> Array:
        """Percent of the draws in each hundred timesteps, (10,)."""
        return percent_by_range(self.density)

    @property
    def weight_share(self) -> Array:
        """Percent of the whole weight in each hundred timesteps, (10,)."""
        return percent_by_range(self.density * self.output)


@dataclass(frozen=True)
class Draws:
    """How often each timestep is drawn (1000,), and the draws of the first steps (steps, samples of a step) if there are any."""

    name: str
    density: Array
    drawn: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Grid:
    """Where the steps of sampling lie: falling timesteps and their sigma / alpha, each (n,), the first of which may be infinite."""

    name: str
    timesteps: Array
    ve_sigmas: Array


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the mean of noise over squares of these sides, in latent pixels, each (n,)."""

    name: str
    sides: Array
    deviations: Array


@dataclass(frozen=True)
class Memory:
    """After each step, (n,): the last so many steps make up half of an average of the weights."""

    name: str
    steps_back: Array


def percent_by_range(values: Array) -> Array:
    """Sums over ten equal ranges, in percent of the whole, (10,)."""
    return np.asarray(100 * values.reshape(RANGES, -1).sum(axis=1) / values.sum())


def plot_schedule(title: str, levels: Sequence[Levels]) -> bytes:
    """How much of the picture and of the noise there is at each timestep, and the ratio of both."""
    page = _Page(title, 2)
    top, bottom = page.panels
    for table, style in zip(levels, _styles(len(levels)), strict=True):
        _line(top, table.alphas, "picture, α" if len(levels) == 1 else table.name, style)
        other = style if len(levels) > 1 else _Style(COLORS[1], "solid")
        _line(top, table.sigmas, "noise, σ" if len(levels) == 1 else "", other)
        _line(bottom, np.where(np.isinf(table.decibels), np.nan, table.decibels), table.name, style)
    several = len(levels) > 1
    _dress(top, "share in the noisy picture", "", legend="" if several else "center left")
    if several:
        _remark(top, "falling: the picture, α    rising: the noise, σ")
    _dress(bottom, "signal to noise, dB", TIMESTEP, legend="lower left" if several else "")
    bottom.axhline(0, color=QUIET, linewidth=0.8)
    bottom.text(0, 0, "as much noise as picture", color=QUIET, fontsize=8, va="bottom")
    _mark_zeros(bottom, levels)
    _quoted_by_samplers(bottom)
    return page.png()


def plot_weights(title: str, weights: Sequence[Weights]) -> bytes:
    """What an error weighs by timestep, in the UNet's output and in the picture, and where the whole weight goes."""
    page = _Page(title, 3)
    output, picture, share = page.panels
    for table, style in zip(weights, _styles(len(weights)), strict=True):
        _line(output, _positive(table.output), table.name, style)
        _line(picture, _positive(table.picture), table.name, style)
        _stairs(share, table.weight_share, "weight" if len(weights) == 1 else table.name, style)
    _stairs(share, weights[0].drawn_share, "draws", None)
    for panel in (output, picture):
        _make_logarithmic(panel)
    named = len(weights) > 1
    _dress(output, "weight of an error\nin the output", "", legend="best" if named else "")
    _dress(picture, "the same, as an error\nin the picture", "")
    _dress(share, "% of all, in each\nhundred timesteps", TIMESTEP, legend="" if named else "best")
    share.set_ylim(bottom=0)
    return page.png()


def plot_timesteps(title: str, draws: Sequence[Draws]) -> bytes:
    """How often each timestep is drawn; and if there are draws, how often it was, and which ones each step got."""
    first = draws[0]
    page = _Page(title, 1 if first.drawn is None else 2)
    panel = page.panels[0]
    if first.drawn is not None:
        edges = np.linspace(0, 1000, 51)
        found = np.histogram(first.drawn, edges)[0] / first.drawn.size * 50
        panel.stairs(found, edges, fill=True, color=BAND, label=f"{first.drawn.size:,} draws of this run")
    spikes = [_draw_density(panel, table, style) for table, style in zip(draws, _styles(len(draws)), strict=True)]
    panel.set_ylim(0, 1.45 * max(float(_without_spike(table.density).max()) * 1000 for table in draws))
    _remark(panel, "    ".join(filter(None, spikes)))
    several = len(draws) > 1 or first.drawn is not None
    _dress(panel, "drawn, in multiples\nof an even share", TIMESTEP, legend="upper left" if several else "", columns=3)
    if first.drawn is not None:
        _draw_steps(page.panels[1], first.drawn)
    return page.png()


def plot_sampling(title: str, grids: Sequence[Grid]) -> bytes:
    """The noise levels that sampling stops at, as sigma / alpha and as timesteps."""
    page = _Page(title, 2)
    noise, timesteps = page.panels
    top = 3 * max(float(grid.ve_sigmas[np.isfinite(grid.ve_sigmas)].max()) for grid in grids)
    for grid, style in zip(grids, _styles(len(grids)), strict=True):
        steps, infinite = np.arange(1, len(grid.timesteps) + 1), np.isinf(grid.ve_sigmas)
        dots: dict[str, Any] = {"color": style.color, "linestyle": style.dash, "linewidth": 1.4, "marker": "o", "markersize": 3.5}
        noise.plot(steps, np.where(infinite, top, grid.ve_sigmas), label=grid.name, **dots)
        timesteps.plot(steps, grid.timesteps, label=grid.name, **dots)
        if infinite.any():
            noise.text(1, top, "   ∞: pure noise", color=INK, fontsize=8.5, va="center")
    _make_logarithmic(noise)
    noise.set_ylim(top=2 * top)
    _dress(noise, "noise over picture, σ/α", "sampling step; after the last one the noise is 0", legend="best" if len(grids) > 1 else "")
    _dress(timesteps, "timestep", "sampling step")
    for panel in page.panels:
        panel.locator_params(axis="x", integer=True)
    return page.png()


def plot_noise(title: str, noises: Sequence[Noise]) -> bytes:
    """How strong the slow patterns of noise are, beside those of plain noise."""
    page = _Page(title, 1)
    panel = page.panels[0]
    sides = noises[0].sides
    panel.plot(sides, 1 / sides, color=QUIET, linewidth=4, alpha=0.35, label="plain noise, 1 / side")
    for table, style in zip(noises, _styles(len(noises)), strict=True):
        panel.plot(
            table.sides,
            table.deviations,
            color=style.color,
            linestyle=style.dash,
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=table.name,
        )
    panel.set_xscale("log", base=2)
    _make_logarithmic(panel)
    panel.set_xticks(sides, [f"{side:g}" for side in sides])
    _dress(
        panel,
        "deviation of the mean\nof a square",
        "side of the square, in latent pixels (8 pixels of the picture each)",
        legend="lower left",
    )
    return page.png()


def plot_learning_rate(title: str, rates: Array, memories: Sequence[Memory]) -> bytes:
    """The learning rate of each step (n,), and how many steps back the averages of the weights reach."""
    page = _Page(title, 2 if memories else 1)
    steps = np.arange(1, len(rates) + 1)
    page.panels[0].plot(steps, rates, color=COLORS[0], linewidth=1.8)
    page.panels[0].set_ylim(0, 1.08 * float(rates.max()) or 1.0)
    page.panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    for memory, style in zip(memories, _styles(len(memories), first=1), strict=True):
        page.panels[1].plot(steps, memory.steps_back, color=style.color, linestyle=style.dash, linewidth=1.8, label=memory.name)
        page.panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(page.panels[0], "learning rate", "optimizer step")
    if memories:
        _dress(page.panels[1], "half of the average is\nfrom the last … steps", "optimizer step", legend="upper left")
        page.panels[1].set_ylim(bottom=0)
    for panel in page.panels:
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else "")
    return page.png()


class _Style(NamedTuple):
    color: str
    dash: Any


class _Page:
    """A white figure with a title and panels below one another, drawn by Agg whatever backend is set."""

    def __init__(self, title: str, num_panels: int) -> None:
        from matplotlib.figure import Figure

        self._figure: Figure = Figure(figsize=(_WIDTH, _PANEL * num_panels + 0.5), dpi=_DPI, layout="constrained", facecolor="white")
        self.panels: list[Axes] = list(self._figure.subplots(num_panels, 1, squeeze=False)[:, 0])
        lines = "\n".join(textwrap.wrap(title, _LETTERS))
        self._figure.suptitle(lines, x=0.01, ha="left", color=INK, fontsize=10.5, fontweight="bold")

    def png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self._figure.align_ylabels()
        file = io.BytesIO()
        FigureCanvasAgg(self._figure).print_png(file, metadata={"Software": None}, pil_kwargs={"optimize": True})
        return file.getvalue()


def _styles(count: int, first: int = 0) -> list[_Style]:
    """Colours, and dashes for those who do not see them."""
    return [_Style(COLORS[(first + i) % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(count)]


def _line(panel: Axes, values: Array, name: str, style: _Style) -> None:
    panel.plot(np.arange(len(values)), values, color=style.color, linestyle=style.dash, linewidth=1.8, label=name or None)


def _stairs(panel: Axes, shares: Array, name: str, style: _Style | None) -> None:
    """Shares of ten ranges: outlined, or for no style a grey ground that the others are compared with."""
    edges = np.linspace(0, 1000, RANGES + 1)
    if style is None:
        panel.stairs(shares, edges, fill=True, color=BAND, label=name, zorder=0.5)
    else:
        panel.stairs(shares, edges, color=style.color, linestyle=style.dash, linewidth=1.8, label=name)


def _positive(values: Array) -> Array:
    """Zeros left out: a logarithmic axis has no place for them."""
    return np.where(values > 0, values, np.nan)


def _mark_zeros(panel: Axes, levels: Sequence[Levels]) -> None:
    """An arrow where the ratio is exactly 0, which no axis reaches."""
    ends = [table for table in levels if np.isinf(table.decibels[-1])]
    if not ends:
        return
    lowest = min(float(table.decibels[np.isfinite(table.decibels)].min()) for table in levels)
    panel.set_ylim(bottom=lowest - 12)
    panel.plot([999], [lowest - 8], marker="v", color=INK, markersize=7, clip_on=False)
    panel.text(985, lowest - 8, "exactly 0 at timestep 999: pure noise", color=INK, fontsize=8.5, ha="right", va="center")


def _quoted_by_samplers(panel: Axes) -> None:
    """The same axis as sigma / alpha = 10^(-dB / 20), which samplers call their sigma."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    axis = panel.secondary_yaxis("right", functions=(lambda dB: -dB, lambda minus: -minus))  # noqa: N803
    noise = np.array([0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 14.6, 100, 1000])
    axis.yaxis.set_major_locator(FixedLocator(20 * np.log10(noise)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10 ** (value / 20):,.4g}"))
    axis.set_ylabel("σ/α, as samplers say", color=INK, fontsize=8.5)
    axis.tick_params(colors=INK, length=0, labelsize=8)
    axis.spines["right"].set_visible(False)


def _without_spike(density: Array) -> Array:
    """The density with its last drawn timestep as likely as the one before it, if it is drawn far more often."""
    last = int(np.flatnonzero(density)[-1])
    if last == 0 or density[last] <= _SPIKE * density[last - 1] or not density[last - 1]:
        return density
    plain = density.copy()
    plain[last] = density[last - 1]
    return plain


def _draw_density(panel: Axes, table: Draws, style: _Style) -> str:
    """The line of a density. Returns a remark about a timestep that the line leaves out because it towers over the rest."""
    plain = _without_spike(table.density)
    _line(panel, 1000 * plain, table.name, style)
    apart = np.flatnonzero(plain != table.density)
    if not len(apart):
        return ""
    return f"{table.name}: {100 * table.density[apart[0]]:.2g} % at timestep {apart[0]} alone ↗"


def _draw_steps(panel: Axes, drawn: npt.NDArray[np.int64]) -> None:
    """A dot for each sample of the first steps."""
    rows = min(len(drawn), SHOWN_STEPS)
    size = max(2.0, min(6.0, 150 / drawn.shape[1]))
    for row in range(rows):
        panel.plot(drawn[row], np.full(drawn.shape[1], row + 1), linestyle="none", marker="o", markersize=size, color=COLORS[0], alpha=0.75)
    _dress(panel, "optimizer step", f"timestep of each of its {drawn.shape[1]} samples" if drawn.shape[1] > 1 else "timestep of its sample")
    panel.set_ylim(rows + 0.6, 0.4)
    panel.set_xlim(-10, 1009)


def _make_logarithmic(panel: Axes) -> None:
    """A vertical axis of whole decades, and at least one of them, with plain numbers."""
    from matplotlib.ticker import NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(10 ** np.floor(np.log10(low)), high if high > 10 * low else 10 * high)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value >= 1e-4 else f"{value:.0e}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _remark(panel: Axes, text: str) -> None:
    """A quiet line above a panel."""
    panel.set_title(text, loc="right", color=QUIET, fontsize=8.5)


def _dress(panel: Axes, y_label: str, x_label: str, *, legend: str = "", columns: int = 1) -> None:
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.tick_params(which="both", colors=INK, length=0, labelsize=8.5)
    panel.set_ylabel(y_label, color=INK, fontsize=9)
    panel.set_xlabel(x_label, color=INK, fontsize=9)
    panel.margins(x=0.01)
    if legend:
        panel.legend(loc=legend, ncols=columns, fontsize=8.5, labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.85)
