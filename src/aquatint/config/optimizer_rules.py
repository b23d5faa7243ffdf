"""Settings of the optimizer's step that do not go together, or do little."""

from __future__ import annotations

from aquatint.config.rule import Rule

OPTIMIZER_RULES = (
    Rule(
        ("training.fused_backward", "training.clip", "training.clip_norm"),
        lambda c: c.training.fused_backward and c.training.clip == "global" and c.training.clip_norm > 0,
        '`training.fused_backward` cannot go with `training.clip = "global"`',
        "the norm of the whole gradient is only known when the first tensors have long been stepped: "
        'set `training.clip = "delayed"` (the norm of the step before) or `"per_tensor"`, or `training.clip_norm = 0`',
    ),
    Rule(
        ("training.clip", "training.clip_norm"),
        lambda c: c.training.clip != "global" and c.training.clip_norm == 0,
        '`training.clip = "{c.training.clip}"` does nothing with `training.clip_norm = 0`',
        "0 does not clip: leave out one of the two",
    ),
)
"""Contradictions: a config with one of them is refused."""

OPTIMIZER_REMARKS = (
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
