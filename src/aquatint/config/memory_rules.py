"""Settings of `memory` that do not go together, or do nothing."""

from __future__ import annotations

from aquatint.config.adapter_rules import has_adapter
from aquatint.config.rule import Rule
from aquatint.config.schema import Config


def keeps_compactly(config: Config) -> bool:
    """Whether frozen layers are kept in another way than as they are."""
    return config.memory.frozen_format != "own" or config.memory.swapped_blocks > 0


MEMORY_RULES = (
    Rule(
        ("memory.frozen_format", "adapter.kind"),
        lambda c: c.memory.frozen_format != "own" and not has_adapter(c),
        '`memory.frozen_format = "{c.memory.frozen_format}"` needs an adapter',
        'weights in few bits cannot learn, and without an adapter all are trained: set `adapter.kind = "lora"`, or leave it out',
    ),
    Rule(
        ("memory.swapped_blocks", "adapter.kind"),
        lambda c: c.memory.swapped_blocks > 0 and not has_adapter(c),
        "`memory.swapped_blocks` needs an adapter",
        'weights that are trained stay beside their gradients: set `adapter.kind = "lora"`, or leave it out',
    ),
    Rule(
        ("memory.swapped_blocks", "memory.frozen_format", "speed.compile"),
        lambda c: keeps_compactly(c) and c.speed.compile != "none",
        '`speed.compile = "{c.speed.compile}"` cannot go with weights that are kept in another format or place',
        "they are made anew whenever they are needed, which is not compiled: leave out `speed.compile`, or the settings of `memory`",
    ),
)
"""Contradictions: a config with one of them is refused."""
