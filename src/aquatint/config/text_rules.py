"""Settings of trained text encoders that do not go together, or do nothing."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.data import CacheSection
from aquatint.config.sections.methods import TextEncodersSection


def trains_text(config: Config) -> bool:
    """Whether a text encoder is trained, so that captions are encoded in every step."""
    return bool(config.text_encoders.train)


def _is_set_without_training(name: str) -> Callable[[Config], bool]:
    return lambda config: not trains_text(config) and getattr(config.text_encoders, name) != getattr(TextEncodersSection(), name)


def _never_stops(config: Config) -> bool:
    stop = config.text_encoders.stop_after
    return stop is not None and (stop.unit == "seconds" or stop.value == 0)


TEXT_RULES = (
    *(
        Rule(
            (f"text_encoders.{name}", "text_encoders.train"),
            _is_set_without_training(name),
            f"`text_encoders.{name}` does nothing without `text_encoders.train`",
            f'none is trained: set `text_encoders.train = ["text_encoder", "text_encoder_2"]`, or leave out `text_encoders.{name}`',
        )
        for name in ("learning_rate_factor", "stop_after")
    ),
    Rule(
        ("text_encoders.learning_rate_factor", "optimizer.name", "text_encoders.train"),
        lambda c: trains_text(c) and c.text_encoders.learning_rate_factor != 1 and c.optimizer.name == "prodigy",
        '`text_encoders.learning_rate_factor = {c.text_encoders.learning_rate_factor:g}` cannot go with the optimizer "prodigy"',
        "it finds one rate for all weights together: set it to 1, or choose another optimizer",
    ),
    Rule(
        ("text_encoders.train",),
        lambda c: len(set(c.text_encoders.train)) < len(c.text_encoders.train),
        "`text_encoders.train` names a text encoder twice",
        "there is one of each: write it once",
    ),
    Rule(
        ("text_encoders.stop_after",),
        _never_stops,
        '`text_encoders.stop_after` ("{c.text_encoders.stop_after}") must be a number of steps, samples or epochs',
        'a run should be the same on any machine: write for example "2 epochs"',
    ),
    Rule(
        ("captions.text", "text_encoders.train"),
        lambda c: trains_text(c) and c.captions.text == "cached",
        '`captions.text = "cached"` cannot go with `text_encoders.train`',
        "what was encoded before a step is not what the encoder says after it: leave out one of the two",
    ),
    Rule(
        ("captions.variants", "text_encoders.train"),
        lambda c: trains_text(c) and c.captions.variants > 1,
        "`captions.variants = {c.captions.variants}` does nothing with `text_encoders.train`",
        "captions are rendered anew for every sample: leave out one of the two",
    ),
    Rule(
        ("cache.text_dtype", "text_encoders.train"),
        lambda c: trains_text(c) and c.cache.text_dtype != CacheSection().text_dtype,
        "`cache.text_dtype` does nothing with `text_encoders.train`",
        "no caption is cached then: leave out one of the two",
    ),
    Rule(
        ("diffusion.mask_prior_weight", "text_encoders.train"),
        lambda c: trains_text(c) and c.diffusion.mask_prior_weight > 0,
        "`diffusion.mask_prior_weight` cannot go with `text_encoders.train`",
        "the base model's answer needs the base's text encoders too, a second time in memory: leave out one of the two",
    ),
)
"""Contradictions: a config with one of them is refused."""
