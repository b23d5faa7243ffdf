"""How far something is: a live bar on a terminal, one plain line every so often anywhere else. All of it on stderr."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WINDOW = 50  # steps that the shown averages reach back
SPEED_WINDOW = 200  # reports that the time left is reckoned from


def say(text: str) -> None:
    """Prints a line of text; above the bar if one is shown. A run keeps it in its log."""
    logging.getLogger("aquatint").info(text)
    print(text, file=sys.stderr, flush=True)


class Bar:
    """A context manager that shows `done` of `total`, and how long the rest will take at the speed since it was opened.

    `figures` gives more short texts to show.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        *,
        figures: Callable[[], list[str]] = list,
        console: Console | None = None,
        plain_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console(stderr=True)
        self._label, self._total, self._done, self._figures = label, total, done, figures
        self._clock, self._plain_seconds, self._last_line = clock, plain_seconds, -math.inf
        self._times: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4) if live else None

    def update(self, done: int, total: int | None = None) -> None:
        """Reports that `done` are done, of `total` if that has changed."""
        self._done, self._total = done, self._total if total is None else total
        now = self._clock()
        self._times.append((now, done))
        if self._live is None and (now - self._last_line >= self._plain_seconds or done >= self._total):
            self._last_line = now
            self.note(self.line())

    def note(self, text: str) -> None:
        """Prints a line of text above the bar. A run keeps it in its log."""
        logging.getLogger("aquatint").info(text)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Everything in one line of text."""
        return " · ".join([f"{self._label} {self._counted()}", *self._figures(), *self._remaining()])

    def __enter__(self) -> Bar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        bar = ProgressBar(total=max(self._total, 1), completed=self._done)
        row.add_row(self._label, bar, " · ".join([self._counted(), *self._remaining()]))
        figures = self._figures()
        return Group(row, Text(" · ".join(figures), style="dim", no_wrap=True, overflow="ellipsis")) if figures else row

    def _counted(self) -> str:
        share = self._done / self._total if self._total else 1.0
        return f"{self._done:,}/{self._total:,} ({math.floor(100 * share)}%)"

    def _remaining(self) -> list[str]:
        if len(self._times) < 2 or self._done >= self._total:
            return []
        (first_time, first_done), (last_time, last_done) = self._times[0], self._times[-1]
        if last_done <= first_done:
            return []
        return [f"{format_seconds((last_time - first_time) / (last_done - first_done) * (self._total - last_done))} left"]


class Progress:
    """A bar for a training run. `start_step` is where a resumed run goes on. Keyword arguments are those of `Bar`.

    Shown are means over the last 50 steps: the loss of one step depends mostly on the noise level that it drew.
    """

    def __init__(self, total_steps: int, start_step: int = 0, **settings: Any) -> None:
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._bar = Bar("step", total_steps, start_step, figures=self._figures, **settings)

    def update(self, step: int, *, loss: float, learning_rate: float, images_per_second: float, data_wait: float) -> None:
        """Reports that `step` steps are done. `data_wait` is the share of the last step that was spent waiting for data."""
        self._recent.append({"loss": loss, "rate": learning_rate, "images": images_per_second, "wait": data_wait})
        self._bar.update(step)

    def note(self, text: str) -> None:
        """Prints a line of text above the bar."""
        self._bar.note(text)

    def line(self) -> str:
        """Everything in one line of text."""
        return self._bar.line()

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)

    def _figures(self) -> list[str]:
        recent = list(self._recent)
        if not recent:
            return []
        images = f"{mean(row['images'] for row in recent):.3g} images/s"
        wait = f"data wait {mean(row['wait'] for row in recent):.0%}"
        return [f"loss {mean(row['loss'] for row in recent):.4f}", f"learning rate {recent[-1]['rate']:.3g}", images, wait]


@contextlib.contextmanager
def track(label: str, total: int, **settings: Any) -> Iterator[Callable[..., None]]:
    """A bar for the block, which gets the bar's `update(done, total=None)`. Keyword arguments are those of `Bar`."""
    with Bar(label, total, **settings) as bar:
        yield bar.update


def mean(values: Iterator[float]) -> float:
    """The mean of those that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def format_seconds(seconds: float) -> str:
    """A length of time as people say it: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
