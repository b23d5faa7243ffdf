"""The loop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from aquatint.data.batch import Batch
from aquatint.errors import AquatintError, NumericalError
from aquatint.training.breakdown import Breakdown
from aquatint.training.state import Every, TrainState
from aquatint.training.step import Parts, StepReport, train_step


class Display(Protocol):
    """Where the user sees how far the run is."""

    def update(self, step: int, *, loss: float, learning_rate: float, images_per_second: float, data_wait: float) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Task:
    """Something that is done every so often, between two steps. It returns the state, mostly as it got it."""

    every: Every
    run: Callable[[TrainState, StepReport], TrainState]
    last: list[float] = field(default_factory=lambda: [time.monotonic()])

    def after(self, before: TrainState, state: TrainState, report: StepReport) -> TrainState:
        if not self.every.due(before, state, seconds=time.monotonic() - self.last[0]):
            return state
        self.last[0] = time.monotonic()
        return self.run(state, report)


@dataclass
class Run:
    """A run, put together by `build`: everything the loop needs, and nothing it has to decide."""

    folder: Path
    parts: Parts
    state: TrainState
    stream: Callable[[TrainState], Generator[Batch]]
    accumulation_steps: int
    total_steps: int
    max_bad_steps: int
    tasks: tuple[Task, ...]
    display: Display
    step: Callable[[Any, Sequence[Any], int], StepReport] | None = None  # what a step is, if not the UNet's
    rate_setting: str = "optimizer.learning_rate"
    breakdown: Breakdown | None = None
    has_ended: Callable[[], bool] = lambda: False  # whether the run is over before its length is reached


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. `stopped` is True if it was asked to stop before its end."""

    state: TrainState
    folder: Path
    stopped: bool
    exported: tuple[Path, ...] = ()


class StopRequest:
    """Set by the first signal, read between steps. A second Ctrl-C leaves at once."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop answers after its step. Main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run, stop: StopRequest) -> TrainResult:
    """Trains until the run is over or somebody asks for a stop. Raises NumericalError after too many bad steps in a row."""
    state = run.state
    with contextlib.closing(run.stream(state)) as batches:
        while not is_over(run, state) and not stop.asked:
            started = time.perf_counter()
            try:
                micro_batches = [next(batches) for _ in range(run.accumulation_steps)]
            except AquatintError:
                if stop.asked:  # what stops a whole process group takes the loader's workers first
                    break
                raise
            waited = time.perf_counter() - started
            report = (run.step or train_step)(run.parts, micro_batches, state.step)
            seconds = time.perf_counter() - started
            parts = run.breakdown.of(report) if run.breakdown is not None else ()
            before, state = state, state.advance(samples=report.samples, loss=report.loss, finite=report.finite, parts=parts)
            guard(run, state, report)
            run.display.update(
                state.step,
                loss=report.loss,
                learning_rate=report.learning_rate,
                images_per_second=report.samples / seconds,
                data_wait=waited / seconds,
            )
            for task in run.tasks:
                state = task.after(before, state, report)
    return TrainResult(state, run.folder, stopped=not is_over(run, state))


def is_over(run: Run, state: TrainState) -> bool:
    """Whether there is nothing left to train."""
    return state.step >= run.total_steps or run.has_ended()


def guard(run: Run, state: TrainState, report: StepReport) -> None:
    """Speaks up about a step that was left out, and stops the run when it does not get better."""
    if report.finite:
        return
    names = ", ".join(report.names[:4]) + (" and others" if len(report.names) > 4 else "")
    run.display.note(f"warning: step {state.step} gave a loss of {report.loss} and was left out (pictures: {names})")
    if state.bad_steps >= run.max_bad_steps:
        raise NumericalError(
            f"the loss or gradient was not finite {state.bad_steps} steps in a row, last at step {state.step} (pictures: {names})",
            hint=f"the last checkpoint is unharmed: go on from it with a lower {run.rate_setting}, or look at those pictures",
        )
