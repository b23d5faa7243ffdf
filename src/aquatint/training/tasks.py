"""What is done between steps: write a row, measure, make pictures, save. Each is a function from state to state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aquatint.errors import StorageError
from aquatint.storage import append_text
from aquatint.tracking.tracker import Tracker
from aquatint.training import checkpoint
from aquatint.training.checkpoint import Trained
from aquatint.training.ema import averaged
from aquatint.training.sampling import SampleRequest, write_samples
from aquatint.training.state import TrainState
from aquatint.training.step import Parts, StepReport
from aquatint.training.trainer import Display
from aquatint.training.validation import ValidationSet, measure, validation_batches

Action = Callable[[TrainState, StepReport], TrainState]
MAX_FAILED_SAVES = 3


def write_row(tracker: Tracker, state: TrainState, values: Mapping[str, float]) -> None:
    """One row. Nothing in it depends on the clock, so a resumed run writes the same rows."""
    tracker.log(state.step, {"samples": state.samples_seen, **values})


def log_action(tracker: Tracker) -> Action:
    """Writes the mean loss since the last row."""

    def run(state: TrainState, report: StepReport) -> TrainState:
        values = {"gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
        if state.loss_count:
            values = {"loss": state.loss_sum / state.loss_count, **values}
        write_row(tracker, state, values)
        return state.logged()

    return run


def validate(parts: Parts, chosen: ValidationSet) -> dict[str, float]:
    """The validation loss of the weights that will be exported, and `val_loss_raw` of the raw ones if they are others."""
    with averaged(parts.ema):
        values = measure(parts, validation_batches(chosen))
    if parts.ema is not None and values:
        values["val_loss_raw"] = measure(parts, validation_batches(chosen))["val_loss"]
    return values


def validate_action(parts: Parts, chosen: ValidationSet, tracker: Tracker, display: Display) -> Action:
    """Measures the loss on held-out pictures."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        values = validate(parts, chosen)
        if values:
            write_row(tracker, state, values)
            display.note(f"step {state.step}: validation loss {values['val_loss']:.4f}")
        return state

    return run


def sample_action(parts: Parts, request: SampleRequest, folder: Path, tracker: Tracker, display: Display) -> Action:
    """Makes pictures from the prompts. Training goes on if that fails: the reason is shown."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        path = folder / f"step-{state.step:06}.png"
        try:
            with averaged(parts.ema):
                write_samples(path, parts.unet, parts.objective, request)
        except Exception as error:  # samples are a look at the run, not a part of it
            display.note(f"warning: no sample pictures at step {state.step}: {error}")
            return state
        tracker.image(state.step, "samples", path)
        return state

    return run


@dataclass
class Saver:
    """Saves the run, and lets it go on for a while when the disk does not take it."""

    folder: Path
    trained: Trained
    plan_digest: str
    keep: int
    display: Display
    failed: list[str] = field(default_factory=list)

    def save(self, state: TrainState) -> None:
        """Raises StorageError."""
        checkpoint.save(self.folder, self.trained, state, plan_digest=self.plan_digest, keep=self.keep)
        self.failed.clear()

    def __call__(self, state: TrainState, report: StepReport) -> TrainState:
        try:
            self.save(state)
        except StorageError as error:
            self.failed.append(error.message)
            self.display.note(f"warning: step {state.step} was not saved ({error.message}); {error.hint}")
            if len(self.failed) >= MAX_FAILED_SAVES:
                raise
        return state


def timings_action(path: Path) -> Action:
    """Writes how long this process has been at it, to a file of its own: it differs from run to run."""
    started = time.monotonic()

    def run(state: TrainState, report: StepReport) -> TrainState:
        append_text(path, json.dumps({"step": state.step, "seconds": round(time.monotonic() - started, 3)}) + "\n")
        return state

    return run
