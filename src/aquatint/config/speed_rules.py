"""Settings of speed that do not go together, or do little."""

from __future__ import annotations

from aquatint.config.adapter_rules import has_adapter
from aquatint.config.rule import Rule

SPEED_RULES = (
    Rule(
        ("speed.kernels", "speed.channels_last"),
        lambda c: c.speed.kernels and not c.speed.channels_last,
        "`speed.kernels` cannot go without `speed.channels_last`",
        "the kernel of the norms reads pictures with their channels last, and turning them at each norm would cost what it saves: "
        "set `speed.channels_last = true`",
    ),
    Rule(
        ("speed.fused_qkv", "adapter.kind"),
        lambda c: c.speed.fused_qkv and has_adapter(c),
        "`speed.fused_qkv` cannot go with an adapter",
        "each of the projections that it joins has an adapter of its own beside it: leave it out",
    ),
    Rule(
        ("speed.compile", "training.gradient_checkpointing"),
        lambda c: c.speed.compile == "blocks" and c.training.gradient_checkpointing == "pointwise",
        '`speed.compile = "blocks"` cannot go with `training.gradient_checkpointing = "pointwise"`',
        "a compiled block decides itself what it computes again: set `training.gradient_checkpointing` to false, or to true",
    ),
)
"""Contradictions: a config with one of them is refused."""

SPEED_REMARKS = (
    Rule(
        ("speed.kernels", "training.device"),
        lambda c: c.speed.kernels and c.training.device == "cpu",
        '`speed.kernels` makes a step slower with `training.device = "cpu"`',
        "plain torch stands in for the kernels there, which is good for trying things out only",
    ),
)
"""Worth a look, but allowed."""
