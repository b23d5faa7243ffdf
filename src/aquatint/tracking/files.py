"""Rows of numbers as JSON lines: `metrics.jsonl` and `timings.jsonl`. They are always kept; other trackers are extras.

`metrics.jsonl` holds only what is the same at every run of the same config, so two files can be compared byte by byte,
also after a resume. What depends on the clock goes to `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquatint.storage import append_text, storage_errors, write_bytes


class MetricsFile:
    """A tracker that appends one JSON object per line, `step` first, then the values in the order they came.

    A value that is not finite is written as null, since JSON has no word for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Raises StorageError."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_text(self.path, json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def image(self, step: int, name: str, path: Path) -> None:
        """Pictures are files of the run already."""

    def close(self) -> None:
        """Every row is in the file as soon as it is logged."""


def truncate_after(path: Path, step: int) -> int:
    """Removes the rows of later steps than `step`, and lines that a crash cut short. Returns how many lines went.

    Called before a run goes on from a checkpoint of `step`, so that no step is in the file twice. Raises StorageError.
    """
    if not path.exists():
        return 0
    with storage_errors("read", path):
        lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= step]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may be written to at this moment: a line without an end is left out. Raises StorageError."""
    with storage_errors("read", path):
        lines = path.read_bytes().splitlines(keepends=True)
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
