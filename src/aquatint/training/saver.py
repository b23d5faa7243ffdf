"""Saves a run, where memory allows while it goes on: what is saved is copied between two steps, and written in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from aquatint.errors import StorageError
from aquatint.training import checkpoint
from aquatint.training.checkpoint import Savable, Tabled
from aquatint.training.main_memory import Copy, Tables, spare_bytes
from aquatint.training.overfit import best_step, rows_of
from aquatint.training.state import TrainState
from aquatint.training.step import StepReport
from aquatint.training.trainer import Display

MAX_FAILED_SAVES = 3
SHARE_UNASKED, SHARE_ASKED = 0.5, 0.9  # of the spare main memory; the rest is for the files that the system keeps in it
GIB = 1 << 30


def share_of_memory(background: bool | Literal["auto"], device: torch.device) -> float:
    """How much of the spare main memory the copy may take: none on a CPU unless it is asked for, where steps want both memory and cores."""
    if background == "auto":
        return SHARE_UNASKED if device.type == "cuda" else 0.0
    return SHARE_ASKED if background else 0.0


class Writing:
    """A save that is under way. The thread does not keep a process alive that is to end at once: a cut-off save is as after a crash."""

    def __init__(self, step: int, write: Callable[[], object]) -> None:
        self.step = step
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"save-{step}", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # `wait` raises it where somebody can answer
            self._error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Raises what the write raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


@dataclass
class Saver:
    """Saves the run, and lets it go on for a while when the disk does not take it.

    One save is under way at most: the next one waits for it. As a context manager it waits at the end, but for a second Ctrl-C.
    """

    folder: Path
    trained: Savable
    plan_digest: str
    keep: int
    display: Display
    failed: list[str] = field(default_factory=list)
    metrics: Path | None = None
    """Where the held-out losses are, if the best checkpoint is to stay too."""
    memory_share: float = 0.0
    """How much of the spare main memory a copy may take, to be written while training goes on; with 0 there is none."""
    copy: Copy = field(default_factory=Copy)
    writing: Writing | None = None
    has_said_why: bool = False

    def save(self, state: TrainState) -> None:
        """Returns when the state is on disk. Raises StorageError."""
        self.settle()
        self.copy = Copy()  # training waits anyway, and may want the memory
        self._write(self.trained, state, self.best_step({state.step, *self.steps()}))
        self.failed.clear()

    def __call__(self, state: TrainState, report: StepReport) -> TrainState:
        """Saves while training goes on if there is memory for it. Raises StorageError when it has failed too often."""
        if self.writing is not None and self.writing.step == state.step:
            return state
        self._stop_if_too_often(self.settle())
        try:
            if self._is_copied(state):
                copy, best = self.copy, self.best_step({state.step, *self.steps()})
                self.writing = Writing(state.step, lambda: self._write(copy, state, best))
            else:
                self.save(state)
        except StorageError as error:
            self._stop_if_too_often(self._failure(state.step, error))
        return state

    def look(self) -> None:
        """Says so if a save has failed meanwhile. Done after every step. Raises StorageError when it has failed too often."""
        if self.writing is not None and self.writing.ended:
            self._stop_if_too_often(self.settle())

    def settle(self) -> StorageError | None:
        """Waits for a save that is under way. Returns why it failed, which is noted, or None."""
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        try:
            writing.wait()
        except StorageError as error:
            return self._failure(writing.step, error)
        self.failed.clear()
        return None

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, newest first."""
        return [checkpoint.step_of(path) for path in checkpoint.sorted_checkpoints(self.folder)]

    def best_step(self, among: Collection[int] | None = None) -> int | None:
        """The step of the lowest held-out loss so far, if that is asked for."""
        return None if self.metrics is None else best_step(rows_of(self.metrics), among)

    def save_best(self, state: TrainState, report: StepReport) -> TrainState:
        """Saves a step that was just measured as the best so far."""
        return self(state, report) if self.best_step() == state.step else state

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.settle()

    def _write(self, source: Tabled, state: TrainState, best: int | None) -> None:
        checkpoint.save(self.folder, source, state, plan_digest=self.plan_digest, keep=self.keep, best_step=best)

    def _is_copied(self, state: TrainState) -> bool:
        """Copies everything. If it is asked for and there is no room for it, the reason is noted once."""
        if self.memory_share == 0:
            return False
        tables = self.trained.tables()
        reason = self._lack_of_room(tables)
        if reason is None:
            self.copy.take(tables)
        elif not self.has_said_why:
            self.has_said_why = True
            self.display.note(f"warning: training waits while step {state.step} is saved, and may wait at the next: {reason}")
        return reason is None

    def _lack_of_room(self, tables: Tables) -> str | None:
        """Makes room for a copy, or says why there is none."""
        if missing := self.copy.missing_bytes(tables):
            spare = spare_bytes()
            if spare is not None and missing > self.memory_share * spare:
                sizes = f"takes {missing / GIB:.1f} GiB of main memory, and {self.memory_share:.0%} of what is free are"
                return f"a copy {sizes} {self.memory_share * spare / GIB:.1f} GiB (`checkpoints.background`)"
        try:
            self.copy.make_room(tables)
        except RuntimeError as error:  # torch has no other for memory that it does not get
            return f"there is no main memory for a copy ({str(error).splitlines()[0]})"
        return None

    def _failure(self, step: int, error: StorageError) -> StorageError:
        self.failed.append(error.message)
        self.display.note(f"warning: step {step} was not saved ({error.message}); {error.hint}")
        return error

    def _stop_if_too_often(self, error: StorageError | None) -> None:
        if error is not None and len(self.failed) >= MAX_FAILED_SAVES:
            raise error
