"""Settings that need a held-out loss, where there is none."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.rule import Rule
from aquatint.config.schema import Config

GO_BY_IT = ("validation.stop_after", "checkpoints.keep_best")


def _is_set(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return bool(getattr(getattr(config, section), name))


def _is_set_unmeasured(key: str) -> Callable[[Config], bool]:
    return lambda config: _is_set(config, key) and config.validation.every is None


def _is_set_with_nothing_held_out(key: str) -> Callable[[Config], bool]:
    return lambda config: _is_set(config, key) and config.validation.every is not None and not _holds_out(config)


def _holds_out(config: Config) -> bool:
    return config.validation.share > 0 or any(source.role == "validation" for source in config.data.sources)


VALIDATION_RULES = (
    *(
        Rule(
            (key, "validation.every"),
            _is_set_unmeasured(key),
            f'`{key}` does nothing with `validation.every = "never"`',
            f'it goes by the held-out loss, which is not measured then: set `validation.every = "500 steps"`, or leave out `{key}`',
        )
        for key in GO_BY_IT
    ),
    *(
        Rule(
            (key, "validation.share", "validation.every", "data.sources"),
            _is_set_with_nothing_held_out(key),
            f"`{key}` does nothing where no picture is held out",
            "the loss of trained pictures does not show when they are known by heart: set `validation.share = 0.02`, "
            'or add a source with `role = "validation"` to `[[data.sources]]`',
        )
        for key in GO_BY_IT
    ),
)
"""Contradictions: a config with one of them is refused."""
