"""The log of a run: what was said, and when."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime


class _Lines(logging.Handler):
    """Hands each record to a function as one line: time in UTC, level, text."""

    def __init__(self, append: Callable[[str], None]) -> None:
        super().__init__()
        self._append = append

    def emit(self, record: logging.LogRecord) -> None:
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        text = record.getMessage().replace("\n", "\n    ")
        self._append(f"{when} {record.levelname.lower()}: {text}\n")


@contextlib.contextmanager
def logged(append: Callable[[str], None], *, name: str = "aquatint") -> Iterator[logging.Logger]:
    """For the block, what the logger `name` and Python's warnings say goes to `append`, line by line.

    `append` is how a line gets into a file, such as `functools.partial(storage.append_text, folder / "run.log")`. What
    it raises passes through to whoever logged.
    """
    handler, loggers = _Lines(append), (logging.getLogger(name), logging.getLogger("py.warnings"))
    levels = [logger.level for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield loggers[0]
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        logging.captureWarnings(False)
