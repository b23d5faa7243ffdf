"""What a rule about several settings is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aquatint.config.schema import Config


@dataclass(frozen=True)
class Rule:
    """`applies` is asked only if all settings in `keys` are valid; `message` and `hint` may hold `{c.section.setting}`."""

    keys: tuple[str, ...]
    applies: Callable[[Config], bool]
    message: str
    hint: str
