"""How many steps a run has, with the arithmetic written out."""

from __future__ import annotations

from dataclasses import dataclass

from aquatint.config.duration import Duration


@dataclass(frozen=True)
class StepPlan:
    """The numbers of a run. `epochs` is how often each sample is seen, a fraction as a rule."""

    samples_per_epoch: int
    batch_size: int
    accumulation_steps: int
    length: Duration
    steps: int

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps

    @property
    def samples(self) -> int:
        return self.steps * self.samples_per_step

    @property
    def epochs(self) -> float:
        return self.samples / self.samples_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        return self.samples_per_epoch / self.samples_per_step

    def lines(self) -> tuple[str, ...]:
        """The arithmetic, one sentence each."""
        per_step, per_epoch = count(self.samples_per_step, "sample"), count(self.samples_per_epoch, "sample")
        return (
            f"a step is a batch of {self.batch_size} × {count(self.accumulation_steps, 'accumulation step')} = {per_step}",
            f"an epoch is {per_epoch} ÷ {self.samples_per_step:,} = {number(self.steps_per_epoch)} steps",
            self._length_line(),
        )

    def _length_line(self) -> str:
        end = f"{count(self.steps, 'step')}, {count(self.samples, 'sample')}, {number(self.epochs)} epochs"
        if self.length.unit == "epochs":
            how = f" = {number(self.length.value)} × {self.samples_per_epoch:,} ÷ {self.samples_per_step:,}, rounded up"
        elif self.length.unit == "samples":
            how = f" = {number(self.length.value)} ÷ {self.samples_per_step:,}, rounded up"
        else:
            how = ""
        return f'the length "{self.length}"{how}: {end}'


def plan_steps(num_samples_per_epoch: int, batch_size: int, accumulation_steps: int, length: Duration) -> StepPlan:
    """Raises ValueError for a length in seconds, which says nothing about steps, and for an epoch without samples."""
    if num_samples_per_epoch < 1:
        raise ValueError("an epoch needs at least one sample")
    steps = length.in_steps(samples_per_step=batch_size * accumulation_steps, samples_per_epoch=num_samples_per_epoch)
    return StepPlan(num_samples_per_epoch, batch_size, accumulation_steps, length, steps)


def expected_held_out(num_pictures: int, *, share: float, max_pictures: int) -> int:
    """About how many pictures are held out for validation. Which ones, and so the exact number, depends on their content."""
    return min(max(round(share * num_pictures), 1), max_pictures, num_pictures // 2) if share > 0 else 0


def count(value: int, noun: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def number(value: float) -> str:
    """At most two decimals, none if it is whole."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")
