"""Settings of `[[training.groups]]` that do not go together, or do nothing. Whether their patterns fit anything: see `planning.groups`."""

from __future__ import annotations

from aquatint.config.rule import Rule
from aquatint.config.schema import Config


def has_frozen_group(config: Config) -> bool:
    """Whether a group asks for tensors that are not trained."""
    return any(group.learning_rate_factor == 0 for group in config.training.groups)


def _ends_without_a_wish(config: Config) -> bool:
    groups = config.training.groups
    return bool(groups) and groups[-1].learning_rate_factor == 1 and groups[-1].weight_decay is None


GROUP_RULES = (
    Rule(
        ("training.groups",),
        lambda c: any(group.learning_rate_factor == 0 and group.weight_decay is not None for group in c.training.groups),
        "`training.groups` has a group with `learning_rate_factor = 0` and a `weight_decay`",
        "what is frozen does not decay: leave out one of the two",
    ),
    Rule(
        ("training.groups",),
        _ends_without_a_wish,
        "`training.groups` ends with a group that asks for nothing",
        "what no group fits is trained in just that way: give it a `learning_rate_factor` or a `weight_decay`, or leave it out",
    ),
)
"""Contradictions: a config with one of them is refused."""
