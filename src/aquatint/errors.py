"""The exception tree, and how an error is shown.

AquatintError (exit 1)
├── UsageError (2)        bad config, bad command line, a file that is not what it should be
│   ├── ConfigError       one or more problems of a config, reported together
│   └── ModelFileError    a base model that cannot be used
├── DataError (3)         the pictures or captions are over a stated limit
├── NumericalError (4)    non-finite losses or gradients that did not go away
├── StorageError (5)      a write or read failed; what was saved before is untouched
├── ResumeError (6)       a run that cannot be continued as asked
├── LockedError (7)       another process owns the run folder
└── Interrupted (75)      stopped on request, saved, and ready to go on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GPU_IS_FULL = (
    "CUDA error: out of memory",  # the driver
    "Triton Error [CUDA]: out of memory",  # a kernel that is being loaded
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "unable to find an engine to execute this computation",  # cuDNN, if no way to do a convolution gets the memory to work in
)
MAIN_MEMORY_IS_FULL = "can't allocate memory"


class AquatintError(Exception):
    """Something went wrong that the user can act on: `message` says what and where, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return render(self.message, self.hint)


class UsageError(AquatintError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake of a config. `where` is `file, line N`, or empty when it has no place."""

    message: str
    hint: str
    where: str = ""

    def __str__(self) -> str:
        return render(f"{self.message} in {self.where}" if self.where else self.message, self.hint)


class ConfigError(UsageError):
    """All the problems of a config at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} found", hint="fix them and run again")

    def __str__(self) -> str:
        return "\n\n".join(str(problem) for problem in self.problems)


class ModelFileError(UsageError):
    pass


class DataError(AquatintError):
    exit_code = 3


class NumericalError(AquatintError):
    exit_code = 4


class StorageError(AquatintError):
    exit_code = 5


class ResumeError(AquatintError):
    exit_code = 6


class LockedError(AquatintError):
    exit_code = 7


class Interrupted(AquatintError):
    exit_code = 75


def render(message: str, hint: str) -> str:
    """`error: …`, a blank line, `hint: …`: readable without colour."""
    return f"error: {message}\n\nhint: {hint}"


def full_memory(error: BaseException) -> Literal["GPU", "main"] | None:
    """Which memory an error says is full, if it says so. Torch has a type of its own only for what its allocator for GPUs does not get."""
    kinds, words = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if "OutOfMemoryError" in kinds or any(known in words for known in GPU_IS_FULL):
        return "GPU"
    return "main" if "MemoryError" in kinds or MAIN_MEMORY_IS_FULL in words else None
