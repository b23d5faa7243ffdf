"""What is done between steps: write a row, measure, make pictures. Each is a function from state to state. To save is in `saver`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aquatint.storage import append_text, write_text
from aquatint.tracking.tracker import Tracker
from aquatint.training.ema import averaged
from aquatint.training.overfit import Watch, measurements, rows_of
from aquatint.training.sampling import SampleRequest, write_samples
from aquatint.training.state import TrainState
from aquatint.training.step import Parts, StepReport
from aquatint.training.trainer import Display
from aquatint.training.validation import Errors, ValidationSet, figures, measure, number_of, worst_text

Action = Callable[[TrainState, StepReport], TrainState]


def write_row(tracker: Tracker, state: TrainState, values: Mapping[str, float]) -> None:
    """One row. Nothing in it depends on the clock, so a resumed run writes the same rows."""
    tracker.log(state.step, {"samples": state.samples_seen, **values})


def log_action(tracker: Tracker) -> Action:
    """Writes the mean losses since the last row."""

    def run(state: TrainState, report: StepReport) -> TrainState:
        means = state.mean_losses()
        own = {"loss": means.pop("loss")} if "loss" in means else {}
        write_row(tracker, state, {**own, "gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate, **means})
        return state.logged()

    return run


@dataclass(frozen=True)
class Validation:
    """What is measured: held-out pictures, and trained ones in the same way, of which there may be none.

    `worst_path` is where the `num_worst` pictures with the highest loss are named. Where nothing could be held out, trained ones
    stand in for them, and `kinds` says so.
    """

    held_out: ValidationSet
    trained: ValidationSet
    worst_path: Path
    num_worst: int
    kinds: tuple[str, str] = ("held out", "trained")


def validate(parts: Parts, chosen: Validation) -> tuple[dict[str, float], tuple[Errors, Errors]]:
    """A row's values and the errors behind them, of the weights that will be exported; two more of the raw ones if these are others."""
    with averaged(parts.ema):
        held_out, trained = measure(parts, chosen.held_out), measure(parts, chosen.trained)
    values = figures(parts.objective, held_out)
    if not values:
        return {}, (held_out, trained)
    if len(trained.names):
        values["train_val_loss"] = figures(parts.objective, trained)["val_loss"]
        values["val_gap"] = values["val_loss"] - values["train_val_loss"]
    if parts.ema is not None:
        raw = figures(parts.objective, measure(parts, chosen.held_out))
        values |= {f"{name}_raw": raw[name] for name in ("val_loss", "val_loss_weighted") if name in raw}
    return {**values, "val_set": number_of(chosen.held_out, parts.objective)}, (held_out, trained)


def validate_action(parts: Parts, chosen: Validation, tracker: Tracker, display: Display, watch: Watch) -> Action:
    """Measures, compares with the first measurement, and lets `watch` look at what came of it."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        values, errors = validate(parts, chosen)
        if values:
            first = measurements([*rows_of(watch.metrics), values])[0]
            if first["val_loss"] is not None and first is not values:
                values["val_change"] = values["val_loss"] - first["val_loss"]
            write_row(tracker, state, values)
            if chosen.num_worst:
                write_text(chosen.worst_path, worst_text(errors, chosen.kinds, step=state.step, number=chosen.num_worst))
            display.note(validation_text(state.step, values))
            watch.look()
        return state

    return run


def validation_text(step: int, values: Mapping[str, float]) -> str:
    """One line on a measurement."""
    trained = f", {values['train_val_loss']:.4f} on trained pictures" if "train_val_loss" in values else ""
    return f"step {step}: validation loss {values['val_loss']:.4f}{trained}"


def sample_action(parts: Parts, request: SampleRequest, folder: Path, tracker: Tracker, display: Display) -> Action:
    """Makes pictures from the prompts. Training goes on if that fails: the reason is shown."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        path = folder / f"step-{state.step:06}.png"
        try:
            with averaged(parts.ema if request.averaged else None):
                write_samples(path, parts.unet, parts.objective, request)
        except Exception as error:  # samples are a look at the run, not a part of it
            display.note(f"warning: no sample pictures at step {state.step}: {error}")
            return state
        tracker.image(state.step, "samples", path)
        return state

    return run


def timings_action(path: Path) -> Action:
    """Writes how long this process has been at it, to a file of its own: it differs from run to run."""
    started = time.monotonic()

    def run(state: TrainState, report: StepReport) -> TrainState:
        append_text(path, json.dumps({"step": state.step, "seconds": round(time.monotonic() - started, 3)}) + "\n")
        return state

    return run
