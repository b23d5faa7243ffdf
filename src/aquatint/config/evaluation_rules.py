"""Settings of `evaluation` that do not go together with what is held out."""

from __future__ import annotations

from aquatint.config.rule import Rule
from aquatint.config.schema import Config


def _measures_held_out(config: Config) -> bool:
    """Whether the share that is held out of the training pictures is what pictures are compared with."""
    section = config.evaluation
    encoders = (section.clip, section.dinov2, section.inception)
    has_own = any(source.role == "validation" for source in config.data.sources)
    return any(path is not None for path in encoders) and section.source == "held_out" and not has_own


def _holds_out(config: Config) -> bool:
    return config.validation.every is not None and config.validation.share > 0


EVALUATION_RULES = (
    Rule(
        ("evaluation.source", "validation.share", "validation.every", "data.sources"),
        lambda c: _measures_held_out(c) and not _holds_out(c),
        '`evaluation.source = "held_out"` finds no pictures, because none are held out',
        'there is nothing to compare with: set `evaluation.source = "train"`, hold some out with `validation.share = 0.02`, '
        'or add a source with `role = "validation"` to `[[data.sources]]`',
    ),
)
"""Contradictions: a config with one of them is refused."""

EVALUATION_REMARKS = (
    Rule(
        ("evaluation.pictures", "validation.max_pictures", "evaluation.source", "data.sources"),
        lambda c: _measures_held_out(c) and _holds_out(c) and c.evaluation.pictures > c.validation.max_pictures,
        "no more than {c.validation.max_pictures} pictures are held out (`validation.max_pictures`), and `aquatint evaluate` wants "
        "{c.evaluation.pictures:,}",
        'a source with `role = "validation"` is held out as a whole, and `evaluation.source = "train"` takes trained pictures',
    ),
)
"""Worth a look, but allowed."""
