"""What a tracker is, and how one that is optional is kept from harming a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")


class Tracker(Protocol):
    """Takes the numbers and pictures of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes some values of one optimizer step."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Takes a PNG file. `name` stays the same from event to event."""

    def close(self) -> None:
        """Brings out what is still held back. Nothing is logged afterwards."""


class Several:
    """Passes everything on to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        for tracker in self._trackers:
            tracker.image(step, name, path)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def guarded(name: str, open_tracker: Callable[[], Tracker], warn: Callable[[str], None]) -> Tracker:
    """An optional tracker: whatever it raises becomes one warning, and from then on it is off."""
    return _Guarded(name, open_tracker, warn)


class _Guarded:
    def __init__(self, name: str, open_tracker: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._tracker: Tracker | None = None
        self._tracker = self._try(open_tracker)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.log(step, values))

    def image(self, step: int, name: str, path: Path) -> None:
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.image(step, name, path))

    def close(self) -> None:
        if (tracker := self._tracker) is not None:
            self._try(tracker.close)
            self._tracker = None

    def _try(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # foreign code of any quality: the run matters more than its picture
            self._tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"warning: {self._name} is off for the rest of this run: {reason} (training goes on; metrics.jsonl has everything)")
            return None
