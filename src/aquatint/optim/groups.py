"""Learning rates and weight decays of single tensors, and which patterns fit a tensor's name. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class GroupSettings:
    """How a tensor is trained: `factor` times the learning rate, where 0 is not at all. The decay is for matrices and convolutions."""

    factor: float
    weight_decay: float

    @property
    def is_frozen(self) -> bool:
        return self.factor == 0


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern names a tensor, or something that the tensor is in: `down_blocks.1` is everything inside of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def first_fit(names: Iterable[str], groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """Name -> the first of the groups (of patterns) that fits it. What none fits is left out."""
    found = {name: next((index for index, group in enumerate(groups) if any(fits(name, one) for one in group)), None) for name in names}
    return {name: index for name, index in found.items() if index is not None}
