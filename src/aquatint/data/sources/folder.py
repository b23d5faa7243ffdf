"""A folder of pictures, with captions in files beside them. Names only: no file is opened here."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".j2k",
    ".pnm", ".ppm", ".pgm", ".pbm", ".qoi",
    ".heic", ".heif", ".jxl",  # cannot be read, but are meant as pictures: set aside with a reason, and not in silence
})  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """What lies in a folder and the folders inside it, sorted by path.

    `captions` has the side file of each picture that has one. `shared` has the groups of pictures that share one,
    `orphans` the side files without a picture, `others` the number of files that are neither, by extension, and
    `unreadable` the folders that could not be listed, with the reason.
    """

    paths: tuple[Path, ...]
    captions: Mapping[Path, Path]
    shared: tuple[tuple[Path, ...], ...]
    orphans: tuple[Path, ...]
    others: Mapping[str, int]
    hidden: int
    unreadable: tuple[str, ...]


def list_folder(folder: Path, caption_extension: str) -> Listing:
    """Lists pictures by extension. Hidden names are skipped; links are followed, each folder once."""
    paths: list[Path] = []
    captions: dict[Path, Path] = {}
    shared: list[tuple[Path, ...]] = []
    orphans: list[Path] = []
    others: Counter[str] = Counter()
    hidden, unreadable = 0, []
    for place, names, problem in _walk(Path(folder)):
        if problem:
            unreadable.append(f"{place}: {problem}")
        visible = [name for name in names if not name.startswith(".")]
        hidden += len(names) - len(visible)
        texts = [name for name in visible if name.lower().endswith(caption_extension.lower())]
        rest = sorted(set(visible).difference(texts))
        pictures = [name for name in rest if _extension(name) in PICTURE_EXTENSIONS]
        others.update(extension for name in rest if (extension := _extension(name)) not in PICTURE_EXTENSIONS)
        side_files = _match(pictures, texts, caption_extension)
        paths.extend(place / name for name in pictures)
        captions.update({place / picture: place / text for picture, text in side_files.items()})
        shared.extend(tuple(place / name for name in group) for group in _groups(side_files) if len(group) > 1)
        orphans.extend(place / text for text in sorted(set(texts).difference(side_files.values())))
    return Listing(
        tuple(sorted(paths, key=_sort_key)), captions, tuple(shared), tuple(sorted(orphans, key=_sort_key)),
        dict(others), hidden, tuple(unreadable),
    )  # fmt: skip


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], str]]:
    """Each folder with the sorted names of its non-folders, and what went wrong if it could not be listed."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link in a circle, or a second way to the same folder
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            yield place, [], error.strerror or str(error)
            continue
        folders = {entry.name for entry in entries if _is_folder(entry)}
        waiting.extend(place / name for name in sorted(folders, reverse=True) if not name.startswith("."))
        yield place, [entry.name for entry in entries if entry.name not in folders], ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is no folder; whoever opens it will say what is wrong
        return False


def _match(pictures: Sequence[str], texts: Sequence[str], caption_extension: str) -> dict[str, str]:
    """The side file of each picture: of the same name, or else of the same name but for case and Unicode form."""
    exact_last = sorted(texts, key=lambda text: text.endswith(caption_extension))
    stems = {text[: -len(caption_extension)]: text for text in exact_last}
    alike = {_fold(stem): text for stem, text in stems.items()}
    found = ((name, stems.get(stem := Path(name).stem, alike.get(_fold(stem)))) for name in pictures)
    return {name: text for name, text in found if text is not None}


def _groups(side_files: Mapping[str, str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for picture, text in side_files.items():
        groups.setdefault(text, []).append(picture)
    return list(groups.values())


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _extension(name: str) -> str:
    return Path(name).suffix.lower()


def _sort_key(path: Path) -> bytes:
    return os.fsencode(path)
