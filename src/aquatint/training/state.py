"""Where a run stands: a value that is passed along and saved, never a global."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aquatint.config.duration import Duration


@dataclass(frozen=True)
class TrainState:
    """Counted from the beginning of the run, also after a resume.

    `loss_sum` and `loss_count` are of the steps since the last row of metrics.jsonl, so that a row that spans a resume
    is the same as without one; `part_sums` and `part_counts` are the same for parts of the samples, by name (see `breakdown`).
    `bad_steps` are the non-finite steps in a row.
    """

    step: int = 0
    samples_seen: int = 0
    bad_steps: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    part_sums: Mapping[str, float] = field(default_factory=dict)
    part_counts: Mapping[str, int] = field(default_factory=dict)

    def advance(self, *, samples: int, loss: float, finite: bool, parts: Iterable[tuple[str, float]] = ()) -> TrainState:
        """The state after one more optimizer step. A bad step uses up its samples but leaves the mean loss alone.

        `parts` has the loss of each sample, once for every part that it belongs to.
        """
        sums, counts = dict(self.part_sums), dict(self.part_counts)
        for name, value in parts:
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1
        return TrainState(
            step=self.step + 1,
            samples_seen=self.samples_seen + samples,
            bad_steps=0 if finite else self.bad_steps + 1,
            loss_sum=self.loss_sum + (loss if finite else 0.0),
            loss_count=self.loss_count + finite,
            part_sums=sums,
            part_counts=counts,
        )

    def ahead(self, samples: int) -> TrainState:
        """Where the run stands after one more step whose loss is not known yet."""
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)

    def mean_losses(self) -> dict[str, float]:
        """`loss`, and `loss_...` of each part, since the last row; each only if there was a step or sample of it."""
        means = {"loss": self.loss_sum / self.loss_count} if self.loss_count else {}
        return means | {f"loss_{name}": total / self.part_counts[name] for name, total in sorted(self.part_sums.items())}

    def logged(self) -> TrainState:
        """The state after its mean losses were written down."""
        return replace(self, loss_sum=0.0, loss_count=0, part_sums={}, part_counts={})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Every:
    """An event that comes up each `duration`. Times are kept by the caller, since they are no part of the state."""

    duration: Duration | None
    samples_per_epoch: int

    def due(self, before: TrainState, after: TrainState, *, seconds: float = 0.0) -> bool:
        """Whether the step from `before` to `after` reached or passed a multiple. `seconds`: since the last event."""
        if self.duration is None or self.duration.value == 0:
            return False
        if self.duration.unit == "seconds":
            return seconds >= self.duration.value
        if self.duration.unit == "steps":
            return after.step // self.duration.value > before.step // self.duration.value
        length = self.duration.value * (self.samples_per_epoch if self.duration.unit == "epochs" else 1)
        return after.samples_seen // length > before.samples_seen // length
