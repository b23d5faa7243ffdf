"""What fields of a config are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from aquatint.config.duration import PATTERN, Duration

NEVER = "never"  # how a config says that something is turned off: TOML has no null

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Color = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$", json_schema_extra={"expected": 'a colour such as "#ffffff"'})]
LOCATION = "location"  # marks settings that are a path or a URL
Location = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"}), LOCATION]
Ending = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9_.-]+$", json_schema_extra={"expected": 'a file ending such as ".txt"'})]
PowerStds = Annotated[
    tuple[Annotated[float, Field(ge=0.01, le=0.25)], ...],
    Field(json_schema_extra={"expected": "a list of numbers from 0.01 to 0.25, such as [0.05, 0.1]"}),
]
Every = Annotated[
    Duration | None,
    BeforeValidator(lambda value: None if value == NEVER else value),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "pattern": PATTERN + f"|^{NEVER}$"}, {"type": "null"}],
            "expected": f'a duration such as "500 steps" or "2 epochs", or "{NEVER}"',
        }
    ),
]


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
