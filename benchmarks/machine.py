"""What a result must say about where it was measured, and where results are kept."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "numpy")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in filter(has, PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a folder on the path, without the name of its version
            found[name] = "unknown"
    return found


def load() -> list[float]:
    """How many processes wanted a core, over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def spread(values: Sequence[float], digits: int = 4) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return [round(values[0], digits)] * 3
    return [round(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive")]


def compact(result: dict[str, Any]) -> str:
    """JSON with each list of plain values on one line."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(result, indent=2))


def keep(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Prints a result and writes it as the one of today."""
    text = compact(result)
    print(text)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(text + "\n")
    return path
