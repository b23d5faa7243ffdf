"""What names say: which are pictures and masks, and how names are shown. No file is touched."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field

PICTURE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".j2k",
    ".pnm", ".ppm", ".pgm", ".pbm", ".qoi",
    ".heic", ".heif", ".jxl",  # cannot be read, but are meant as pictures: set aside with a reason, and not in silence
})  # fmt: skip
MASK_ENDINGS = ("-masklabel", ".mask", "_mask")  # after the picture's stem, in order of preference; the first is OneTrainer's
MASK_FOLDER = "masks"  # or else in a folder of this name beside the pictures, with the picture's stem
MAX_NAMED = 20  # in one message


@dataclass
class Names:
    """Names to tell: the first few, and how many there are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < MAX_NAMED:
            self.first.append(name)

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


def printable(name: str) -> str:
    """The name with anything unprintable escaped: line ends, control codes, bytes that are no text."""
    if name.isprintable():
        return name
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    return extension(name) in PICTURE_EXTENSIONS


def stems(names: Iterable[str]) -> dict[str, str]:
    """Each name and what it is without its extension; of a path, the whole path."""
    return {name: posixpath.splitext(name)[0] for name in names}


def with_ending(names: Iterable[str], ending: str) -> dict[str, str]:
    """What stands before the ending, of the names that have it in any case; the exact case wins."""
    small = ending.lower()
    return {name[: -len(ending)]: name for name in sorted(names, key=lambda name: name.endswith(ending)) if name.lower().endswith(small)}


def mask_base(name: str) -> tuple[int, str] | None:
    """If the name is one of a mask: which way of naming it is, in order of preference, and the stem of its picture."""
    if not is_picture(name):
        return None
    stem = posixpath.splitext(name)[0]
    if stem.lower().endswith(MASK_ENDINGS):
        way = next(index for index, ending in enumerate(MASK_ENDINGS) if stem.lower().endswith(ending))
        return way, stem[: -len(MASK_ENDINGS[way])]
    folder, _, base = stem.rpartition("/")
    if posixpath.basename(folder) == MASK_FOLDER:
        return len(MASK_ENDINGS), posixpath.join(posixpath.dirname(folder), base)
    return None
