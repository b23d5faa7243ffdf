"""What lies in a picture folder of another trainer. Names only: no file is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")  # that sd-scripts reads


@dataclass(frozen=True)
class Survey:
    """Pictures directly in a folder, how many of them have a caption file, by ending, and the folders inside with pictures too."""

    num_pictures: int
    num_captioned: int
    endings: tuple[str, ...]
    inner: tuple[str, ...]


def survey(folder: Path, endings: Sequence[str]) -> Survey | None:
    """Of a caption file, only one of `endings` counts. None if there is no such folder, or it cannot be listed."""
    try:
        with os.scandir(folder) as scan:
            entries = [(entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith(".")]
    except OSError:
        return None
    files = [name for name, is_folder in entries if not is_folder]
    stems = [os.path.splitext(name)[0] for name in files if _is_picture(name)]  # noqa: PTH122
    found = {ending: {name.removesuffix(ending) for name in files if name.endswith(ending)} for ending in endings}
    captioned = sum(any(stem in texts for texts in found.values()) for stem in stems)
    used = tuple(ending for ending, texts in found.items() if not texts.isdisjoint(stems))
    inner = sorted(name for name, is_folder in entries if is_folder and any(map(_is_picture, _names(folder / name))))
    return Survey(len(stems), captioned, used, tuple(inner))


def _names(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return ()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)
