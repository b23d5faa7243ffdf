"""What every source gives: pictures by name and place, before any of their bytes are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple

from aquatint.data.places import Identity, Place

Role = Literal["train", "regularization", "validation"]


@dataclass(frozen=True)
class Source:
    """Where pictures come from, and what they are for.

    `path` is a folder, file, glob or URL. `repeats` is how often each picture is shown per epoch, and may be broken.
    Empty columns are found by their usual names.
    """

    path: str
    kind: Literal["folder", "table", "tar"] = "folder"
    caption_extensions: tuple[str, ...] = (".txt",)
    caption_lines: Literal["whole", "alternatives"] = "whole"
    picture_column: str = ""
    caption_columns: tuple[str, ...] = ()
    mask_column: str = ""
    masks: Literal["none", "alpha", "files"] = "none"
    role: Role = "train"
    repeats: Fraction = Fraction(1)
    loss_weight: float = 1.0
    trigger: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed picture. `name` is for people, always printable. Several `captions` are alternatives; `caption` is a side file of them."""

    name: str
    picture: Place
    identity: Identity
    captions: tuple[str, ...] = ()
    caption: Place | None = None
    caption_identity: Identity | None = None
    mask: Place | None = None
    mask_identity: Identity | None = None


@dataclass
class Remarks:
    """What a source has to say about its listing: warnings, files left alone by extension, and (name, reason) of rows without a picture."""

    warnings: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)


class Contents(NamedTuple):
    """What lies directly in a folder. `identity_of` raises OSError for a name that cannot be opened."""

    folders: Sequence[str]
    files: Sequence[str]
    identity_of: Callable[[str], Identity]
