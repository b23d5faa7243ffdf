"""Durations are text with a unit: `"500 steps"`, `"1 epoch"`, `"20000 samples"`, `"30 min"`. Never a bare integer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

Unit = Literal["steps", "epochs", "samples", "seconds"]
_UNITS: dict[str, tuple[Unit, float]] = {
    "step": ("steps", 1), "steps": ("steps", 1),
    "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "sample": ("samples", 1), "samples": ("samples", 1),
    "s": ("seconds", 1), "sec": ("seconds", 1), "second": ("seconds", 1), "seconds": ("seconds", 1),
    "min": ("seconds", 60), "minute": ("seconds", 60), "minutes": ("seconds", 60),
    "h": ("seconds", 3600), "hour": ("seconds", 3600), "hours": ("seconds", 3600),
}  # fmt: skip
PATTERN = rf"^\s*\d+(\.\d+)?\s*({'|'.join(_UNITS)})\s*$"
_PARTS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """A length of training. `steps` are optimizer steps, `epochs` laps over the pictures, `samples` pictures seen."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str | Duration) -> Duration:
        """Raises ValueError that says what is expected."""
        if isinstance(text, Duration):
            return text
        match = _PARTS.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'{text!r} is not a duration; write a number and a unit, such as "500 steps" or "2 epochs"')
        unit, factor = _UNITS[match[2]]
        value = float(match[1]) * factor
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]!r}… is too long")
        return cls(value, unit)

    def __str__(self) -> str:
        """Text that `parse` turns into the same value, whatever its size."""
        unit = self.unit.removesuffix("s") if self.value == 1 else self.unit
        number = f"{Decimal(repr(self.value)).normalize():f}"
        return f"{number} {'s' if self.unit == 'seconds' else unit}"

    def in_steps(self, *, samples_per_step: int, samples_per_epoch: int) -> int:
        """The number of optimizer steps that reach this duration (rounded up). Raises ValueError for seconds."""
        return int(-(-self.in_samples(samples_per_step=samples_per_step, samples_per_epoch=samples_per_epoch) // samples_per_step))

    def in_samples(self, *, samples_per_step: int, samples_per_epoch: int) -> float:
        """The number of samples that pass in this duration. Raises ValueError for seconds."""
        if self.unit == "seconds":
            raise ValueError("a time cannot be turned into samples or steps")
        return {"steps": samples_per_step, "epochs": samples_per_epoch, "samples": 1}[self.unit] * self.value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": PATTERN, "expected": 'a duration such as "500 steps" or "2 epochs"'}
