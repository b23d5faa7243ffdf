"""Whether a run still gets better. It follows from the rows of metrics.jsonl alone, so a resumed run decides as a straight one does."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquatint.tracking.files import read_rows

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What the measurements so far say. `since_best` is how many came after the best one."""

    best_step: int
    best_loss: float
    since_best: int
    overfits: bool
    ends: bool


def measurements(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows with a held-out loss that compares with the last one's: of the same pictures, captions and noise levels."""
    measured = [row for row in rows if "val_loss" in row]
    return [row for row in measured if row.get("val_set") == measured[-1].get("val_set")]


def judge(rows: Rows, *, overfit_after: int, stop_after: int) -> Verdict | None:
    """None before the first measurement with a finite loss. The best is the first of the lowest; what is not finite is never better.

    The run overfits if its last `overfit_after` losses were above the best while that of trained pictures is below what it was
    then. It ends after `stop_after` measurements without a new best; 0 never ends it.
    """
    measured = measurements(rows)
    losses = [_finite(row["val_loss"]) for row in measured]
    best_loss = min(losses, default=math.inf)
    if best_loss == math.inf:
        return None
    best = losses.index(best_loss)
    since = len(losses) - 1 - best
    worse = since >= overfit_after and all(loss > best_loss for loss in losses[-overfit_after:])
    fell = _finite(measured[-1].get("train_val_loss")) < _finite(measured[best].get("train_val_loss"))
    return Verdict(measured[best]["step"], best_loss, since, overfits=worse and fell, ends=0 < stop_after <= since)


def _finite(value: float | None) -> float:
    """A row's value as a number; infinity for null, which stands for one that is not finite."""
    return math.inf if value is None else value


def best_step(rows: Rows, among: Collection[int] | None = None) -> int | None:
    """The step with the lowest held-out loss, of these or of all; None if none of them was measured."""
    measured = [(_finite(row["val_loss"]), row["step"]) for row in measurements(rows) if among is None or row["step"] in among]
    loss, step = min(measured, default=(math.inf, 0))
    return step if loss < math.inf else None


def rows_of(metrics: Path) -> list[dict[str, Any]]:
    """The rows that were written so far; none if there is no file yet. Raises StorageError."""
    return read_rows(metrics) if metrics.exists() else []


@dataclass
class Watch:
    """Looks at the rows after each measurement, says so when the run begins to overfit, and knows when it is over."""

    metrics: Path
    overfit_after: int
    stop_after: int
    note: Callable[[str], None]
    ended: bool = False

    def verdict(self, rows: Rows) -> Verdict | None:
        return judge(rows, overfit_after=self.overfit_after, stop_after=self.stop_after)

    def look(self) -> None:
        """Decides anew after a measurement. The warning comes once, when it becomes true."""
        rows = rows_of(self.metrics)
        verdict, before = self.verdict(rows), self.verdict(measurements(rows)[:-1])
        if verdict is not None and verdict.overfits and not (before is not None and before.overfits):
            self.note(overfit_text(verdict))
        self.decide()

    def decide(self) -> None:
        """Whether the run is over, from what was measured so far."""
        verdict = self.verdict(rows_of(self.metrics))
        self.ended = verdict is not None and verdict.ends

    def closing_words(self, kept: Collection[int]) -> str | None:
        """Why the run ended before its length, if it did; `kept` are the steps that there are checkpoints of."""
        verdict = self.verdict(rows_of(self.metrics))
        return ending_text(verdict, kept) if verdict is not None and verdict.ends else None


def overfit_text(verdict: Verdict) -> str:
    """The warning."""
    return (
        f"warning: the held-out loss was lowest at step {verdict.best_step} ({verdict.best_loss:.4f}) and has been above that for "
        f"{verdict.since_best} measurements, while that of trained pictures fell: the run begins to know them by heart"
    )


def ending_text(verdict: Verdict, kept: Collection[int]) -> str:
    """Why a run ended early, and where its best weights are."""
    name = f"step-{verdict.best_step:06}"
    where = f"its checkpoint is kept: `aquatint export run.toml --checkpoint {name}` makes a file of it"
    if verdict.best_step == 0:
        where = "that is the base model itself"
    elif verdict.best_step not in kept:
        where = "there is no checkpoint of that step; `checkpoints.keep_best = true` keeps one"
    return (
        f"ended early: {verdict.since_best} measurements without a lower held-out loss than that of step {verdict.best_step} "
        f"({verdict.best_loss:.4f}); {where}"
    )
