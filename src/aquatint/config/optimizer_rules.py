"""Settings of the optimizer's step that do not go together, or do little."""

from __future__ import annotations

from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.library_optimizers import LIBRARY_NAMES
from aquatint.config.sections.steps import TrainingSection


def _is_far_from_one(rate: float) -> bool:
    return rate > 0 and not 0.1 <= rate <= 2


def _other_product(section: TrainingSection) -> bool:
    size, known = section.batch_size, section.pictures_per_step
    return size != "auto" and known is not None and known != size * section.accumulation_steps


def _has_group_rates(config: Config) -> bool:
    return any(group.learning_rate_factor not in (0.0, 1.0) for group in config.training.groups)


OPTIMIZER_RULES = (
    Rule(
        ("training.fused_backward", "training.clip", "training.clip_norm"),
        lambda c: c.training.fused_backward and c.training.clip == "global" and c.training.clip_norm > 0,
        '`training.fused_backward` cannot go with `training.clip = "global"`',
        "the norm of the whole gradient is only known when the first tensors have long been stepped: "
        'set `training.clip = "delayed"` (the norm of the step before) or `"per_tensor"`, or `training.clip_norm = 0`',
    ),
    Rule(
        ("training.batch_size", "training.pictures_per_step"),
        lambda c: c.training.batch_size == "auto" and c.training.pictures_per_step is None,
        '`training.batch_size = "auto"` needs `training.pictures_per_step`',
        "how many pictures a step learns from decides about the learning rate, whatever the memory: "
        "set `training.pictures_per_step = 16`, or `training.batch_size` to a number",
    ),
    Rule(
        ("training.accumulation_steps", "training.batch_size"),
        lambda c: c.training.batch_size == "auto" and c.training.accumulation_steps != 1,
        '`training.accumulation_steps = {c.training.accumulation_steps}` cannot go with `training.batch_size = "auto"`',
        "it follows from what fits and from `training.pictures_per_step`: leave it out",
    ),
    Rule(
        ("training.pictures_per_step", "training.batch_size", "training.accumulation_steps"),
        lambda c: _other_product(c.training),
        "`training.pictures_per_step = {c.training.pictures_per_step}` is not "
        "`training.batch_size` × `training.accumulation_steps` ({c.training.batch_size} × {c.training.accumulation_steps})",
        'those two say it already: leave it out, or set `training.batch_size = "auto"`',
    ),
    Rule(
        ("training.clip", "training.clip_norm"),
        lambda c: c.training.clip != "global" and c.training.clip_norm == 0,
        '`training.clip = "{c.training.clip}"` does nothing with `training.clip_norm = 0`',
        "0 does not clip: leave out one of the two",
    ),
    Rule(
        ("training.fused_backward", "optimizer.name"),
        lambda c: c.training.fused_backward and c.optimizer.name in LIBRARY_NAMES,
        '`training.fused_backward` cannot go with the optimizer "{c.optimizer.name}"',
        "its library steps all weights at once, when every gradient is there: "
        'set `optimizer.name = "adamw8bit"` or another of ours, or leave out `training.fused_backward`',
    ),
    Rule(
        ("memory.optimizer_state", "optimizer.name"),
        lambda c: c.memory.optimizer_state == "cpu" and c.optimizer.name in LIBRARY_NAMES,
        '`memory.optimizer_state = "cpu"` cannot go with the optimizer "{c.optimizer.name}"',
        "its library wants all of its state where the weights are: "
        'set `optimizer.name = "adamw"` or another of ours, `"bnb_paged_adamw8bit"` without this setting, or leave it out',
    ),
    Rule(
        ("training.precision", "optimizer.name"),
        lambda c: c.training.precision == "bf16_pure" and c.optimizer.name in LIBRARY_NAMES,
        '`training.precision = "bf16_pure"` cannot go with the optimizer "{c.optimizer.name}"',
        "it rounds bf16 weights to the nearest, which swallows most small updates, or by chance that a resumed run would not repeat: "
        'set `optimizer.name = "adamw_bf16"`, `"adamw8bit"` or `"adafactor"`, or `training.precision = "bf16_mixed"`',
    ),
    Rule(
        ("lr.schedule", "optimizer.name"),
        lambda c: c.lr.schedule != "constant" and c.optimizer.name == "schedule_free",
        '`lr.schedule = "{c.lr.schedule}"` cannot go with the optimizer "schedule_free"',
        "its average does what a falling learning rate would do: leave out `lr.schedule`; a warm-up (`lr.warmup`) is welcome",
    ),
    Rule(
        ("ema.enabled", "optimizer.name"),
        lambda c: c.ema.enabled and c.optimizer.name == "schedule_free",
        '`ema.enabled` cannot go with the optimizer "schedule_free"',
        "it averages the weights by itself, and that average is what is measured, drawn and exported: set `ema.enabled = false`",
    ),
    Rule(
        ("optimizer.betas", "optimizer.name"),
        lambda c: c.optimizer.name == "schedule_free" and c.optimizer.betas[0] == 0,
        '`optimizer.betas` cannot begin with 0 with the optimizer "schedule_free"',
        "gradients would be taken at weights that the average has no part in, and from which it cannot be told: write `[0.9, 0.99]`",
    ),
    Rule(
        ("training.groups", "optimizer.name"),
        lambda c: c.optimizer.name == "prodigy" and _has_group_rates(c),
        '`training.groups` cannot give the optimizer "prodigy" several learning rates',
        "it finds one for all weights together: set `learning_rate_factor` to 0 (frozen) or leave it out, or choose another optimizer",
    ),
)
"""Contradictions: a config with one of them is refused."""

OPTIMIZER_REMARKS = (
    Rule(
        ("optimizer.learning_rate", "optimizer.name"),
        lambda c: c.optimizer.name == "prodigy" and _is_far_from_one(c.optimizer.learning_rate),
        "`optimizer.learning_rate = {c.optimizer.learning_rate:g}` multiplies the rate that prodigy finds by itself",
        "1 is usual, and `optimizer.d_coef` is there for more or less",
    ),
    Rule(
        ("training.clip", "training.fused_backward"),
        lambda c: c.training.clip == "delayed" and c.training.clip_norm > 0 and not c.training.fused_backward,
        '`training.clip = "delayed"` goes by an older norm than it has to',
        "without `training.fused_backward` that of the step itself is known: leave out `training.clip`",
    ),
    Rule(
        ("training.fused_backward", "training.accumulation_steps"),
        lambda c: c.training.fused_backward and c.training.accumulation_steps > 1,
        "`training.fused_backward` saves little memory with `training.accumulation_steps = {c.training.accumulation_steps}`",
        "gradients have to wait for the last pass of a step, all of them: a larger `training.batch_size` in one pass has none that wait",
    ),
)
"""Worth a look, but allowed."""
