"""The loop."""

from __future__ import annotations

import contextlib
import math
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
from aquatint.training.state import TrainState
from aquatint.training.step import Launched, Parts, StepReport, train_step


class Display(Protocol):
    """Where the user sees how far the run is."""

    def update(self, step: int, *, loss: float, learning_rate: float, images_per_second: float, data_wait: float) -> None: ...
    def note(self, text: str) -> None: ...


class Occasion(Protocol):
    """When something is to be done: `Every` so often, or once."""

    def due(self, before: TrainState, after: TrainState, *, seconds: float = 0.0) -> bool: ...


@dataclass(frozen=True)
class Task:
    """Something that is done every so often, between two steps. It returns the state, mostly as it got it."""

    every: Occasion
    run: Callable[[TrainState, StepReport], TrainState]
    last: list[float] = field(default_factory=lambda: [time.monotonic()])


def due_tasks(tasks: Sequence[Task], before: TrainState, after: TrainState) -> list[Task]:
    """What is to be done after the step from `before` to `after`, of which no more than the places need to be known. It counts as done."""
    now = time.monotonic()
    due = [task for task in tasks if task.every.due(before, after, seconds=now - task.last[0])]
    for task in due:
        task.last[0] = now
    return due


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
    step: Callable[[Any, Sequence[Any], int], Launched] | None = None  # what a step is, if not the UNet's
    rate_setting: str = "optimizer.learning_rate"
    breakdown: Breakdown | None = None
    has_ended: Callable[[], bool] = lambda: False  # whether the run is over before its length is reached
    look_aside: Callable[[], None] = lambda: None  # after every step: speaks up about what goes on beside the loop


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


@dataclass
class Course:
    """How far a run is. `state` is the last one that is known; at most one more step is `launched`.

    Its numbers are read when those of the next one are asked for, so that a GPU always has the next step before it.
    """

    run: Run
    state: TrainState
    launched: Launched | None = None
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    @property
    def ahead(self) -> TrainState:
        """Where the run stands with the launched step."""
        return self.state if self.launched is None else self.state.ahead(self.launched.samples)

    def take(self, batches: Iterator[Any]) -> list[Any]:
        """What the next step is made of."""
        started = time.perf_counter()
        taken = [next(batches) for _ in range(self.run.accumulation_steps)]
        self.waited += time.perf_counter() - started
        return taken

    def settle(self) -> None:
        """Waits for the launched step, if there is one, and makes it known. Raises NumericalError if too many were bad."""
        if self.launched is None:
            return
        report, self.launched = self.launched.read(), None
        parts = self.run.breakdown.of(report) if self.run.breakdown is not None else ()
        self.state = self.state.advance(samples=report.samples, loss=report.loss, finite=report.finite, parts=parts)
        guard(self.run, self.state, report)
        now = time.perf_counter()
        seconds = now - self.since
        self.run.display.update(
            self.state.step,
            loss=report.loss,
            learning_rate=report.learning_rate,
            images_per_second=report.samples / seconds,
            data_wait=self.waited / seconds,
        )
        self.since, self.waited = now, 0.0


def train(run: Run, stop: StopRequest) -> TrainResult:
    """Trains until the run is over or somebody asks for a stop. Raises NumericalError after too many bad steps in a row.

    Tasks, the end and a stop find every step known. In between one step may not be, and then that error comes one step late.
    """
    course = Course(run, run.state)
    with contextlib.closing(run.stream(run.state)) as batches:
        while not is_over(run, course.ahead) and not stop.asked:
            try:
                micro_batches = course.take(batches)
            except AquatintError:
                if stop.asked:  # what stops a whole process group takes the loader's workers first
                    break
                raise
            launched = (run.step or train_step)(run.parts, micro_batches, course.ahead.step)
            course.settle()
            before, course.launched = course.state, launched
            run.look_aside()
            due = due_tasks(run.tasks, before, course.ahead)
            if due or launched.is_ready():
                course.settle()
            for task in due:
                course.state = task.run(course.state, launched.read())
            if due:
                course.since = time.perf_counter()
        course.settle()
    return TrainResult(course.state, run.folder, stopped=not is_over(run, course.state))


def is_over(run: Run, state: TrainState) -> bool:
    """Whether there is nothing left to train."""
    return state.step >= run.total_steps or run.has_ended()


def guard(run: Run, state: TrainState, report: StepReport) -> None:
    """Speaks up about a step that the device left out, and stops the run when it does not get better."""
    if report.finite:
        return
    names = ", ".join(report.names[:4]) + (" and others" if len(report.names) > 4 else "")
    found = f"a loss of {report.loss} and a gradient of norm {report.gradient_norm}"
    only = " for the weights whose gradient was not finite" if report.by_part and math.isfinite(report.loss) else ""
    run.display.note(f"warning: step {state.step} gave {found} and was left out{only} (pictures: {names})")
    if state.bad_steps >= run.max_bad_steps:
        raise NumericalError(
            f"the loss or gradient was not finite {state.bad_steps} steps in a row, last at step {state.step} (pictures: {names})",
            hint=f"the last checkpoint is unharmed: go on from it with a lower {run.rate_setting}, or look at those pictures",
        )
