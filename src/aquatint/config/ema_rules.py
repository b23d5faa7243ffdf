"""Settings of the averages that do not go together, or do little."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.duration import Duration
from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.steps import EmaSection

FEW_SNAPSHOTS = 8  # of widths 0.05 and 0.1, so many make one of 0.08 to 1 %, and one of 0.2 to 8 %


def _is_set_without_ema(name: str) -> Callable[[Config], bool]:
    return lambda config: not config.ema.enabled and bool(getattr(config.ema, name))


def _times(config: Config, part: Duration | None, whole: Duration) -> float | None:
    """How often a duration fits into another; None if that is not known without counting the pictures."""
    per_step = config.training.per_step
    if part is None or part.value == 0:
        return None
    if part.unit == whole.unit:
        return whole.value / part.value
    sizes = {"steps": per_step, "samples": 1}
    known = part.unit in sizes and whole.unit in sizes
    return whole.value * sizes[whole.unit] / (part.value * sizes[part.unit]) if known else None


def _kept_by_ema(config: Config) -> float:
    """The base model's share of the average at the end of the run; 0 if that is not known."""
    length, half_life = config.training.length, config.ema.half_life
    if half_life is None:
        return config.ema.decay**length.value if length.unit == "steps" else 0.0
    times = _times(config, half_life, length)
    return 0.0 if times is None else 0.5**times


def _has_few_snapshots(config: Config) -> bool:
    times = _times(config, config.ema.snapshot_every, config.training.length)
    return bool(config.ema.power_stds) and times is not None and times < FEW_SNAPSHOTS


EMA_RULES = (
    Rule(
        ("ema.half_life", "ema.decay"),
        lambda c: c.ema.half_life is not None and c.ema.decay != EmaSection().decay,
        "`ema.half_life` and `ema.decay` say two things about the same",
        "a decay is for one size of step, a half-life for any: keep one of them",
    ),
    Rule(
        ("ema.half_life",),
        lambda c: c.ema.half_life is not None and c.ema.half_life.unit == "seconds",
        "`ema.half_life` cannot be a time",
        'the average should be the same on any machine: write it as "20000 samples" or "1000 steps"',
    ),
    Rule(
        ("ema.half_life",),
        lambda c: c.ema.half_life is not None and c.ema.half_life.value == 0,
        "`ema.half_life` is zero",
        'nothing would be averaged: write "20000 samples", or `ema.enabled = false` for the weights as they are',
    ),
    *(
        Rule(
            (f"ema.{name}", "ema.enabled"),
            _is_set_without_ema(name),
            f"`ema.{name}` does nothing with `ema.enabled = false`",
            f"no average is kept: leave out `ema.enabled`, or `ema.{name}`",
        )
        for name in ("half_life", "power_stds")
    ),
    Rule(
        ("ema.power_stds",),
        lambda c: len({f"{std:.3f}" for std in c.ema.power_stds}) < len(c.ema.power_stds),
        "`ema.power_stds` names the same average twice, to three decimals",
        "a second one would tell nothing new, and takes 10 GB: write each once, such as [0.05, 0.1]",
    ),
    Rule(
        ("ema.snapshot_every", "ema.power_stds"),
        lambda c: not c.ema.power_stds and c.ema.snapshot_every != EmaSection().snapshot_every,
        "`ema.snapshot_every` does nothing without `ema.power_stds`",
        "it is about those averages: set `ema.power_stds = [0.05, 0.1]`, or leave out `ema.snapshot_every`",
    ),
    Rule(
        ("ema.snapshot_every",),
        lambda c: c.ema.snapshot_every.unit == "seconds",
        "`ema.snapshot_every` cannot be a time",
        'a resumed run should leave the same snapshots: count in steps or epochs, such as "1000 steps"',
    ),
    Rule(
        ("ema.snapshot_every",),
        lambda c: c.ema.snapshot_every.value == 0,
        "`ema.snapshot_every` is zero",
        'zero steps never pass: write how often, such as "1000 steps"',
    ),
)
"""Contradictions: a config with one of them is refused."""

EMA_REMARKS = (
    Rule(
        ("ema.decay", "ema.half_life", "ema.warmup", "training.length"),
        lambda c: c.ema.enabled and not c.ema.warmup and _kept_by_ema(c) > 0.5,
        "without `ema.warmup`, the average will still be mostly the base model when the run ends",
        "set `ema.warmup = true`, or a shorter memory (`ema.decay`, `ema.half_life`)",
    ),
    Rule(
        ("ema.snapshot_every", "ema.power_stds", "training.length"),
        _has_few_snapshots,
        'with `ema.snapshot_every = "{c.ema.snapshot_every}"` there will be too few snapshots to make other averages of',
        f"`aquatint ema` wants {FEW_SNAPSHOTS} or more over the run",
    ),
)
"""Worth a look, but allowed."""
