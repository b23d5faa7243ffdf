"""Captions and masks in files of their own: which belongs to which picture, by their names alone."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aquatint.data.downloads import public_name
from aquatint.data.sources.listing import Remarks, Source
from aquatint.data.sources.names import MASK_ENDINGS, Names, extension, is_picture, mask_base, stems, with_ending


@dataclass
class Notices:
    """What the names of a source give reason to say."""

    shared: Names = field(default_factory=Names)
    orphans: Names = field(default_factory=Names)
    masks_without: Names = field(default_factory=Names)
    masks_unused: Names = field(default_factory=Names)

    def texts(self, source: Source) -> Iterator[str]:
        where = public_name(source.path)
        if self.shared.count:
            yield f"pictures of the same name share one caption; rename them if that is not meant: {self.shared}"
        if self.orphans.count:
            yield f"{_counted(self.orphans, 'caption file')} in {where} without a picture: {self.orphans}"
        if self.masks_without.count:
            yield f"{_counted(self.masks_without, 'mask')} in {where} without a picture: {self.masks_without}"
        if self.masks_unused.count:
            yield (
                f'{_counted(self.masks_unused, "mask")} in {where} left alone; set masks = "files" in data.sources to train with masks: '
                f"{self.masks_unused}"
            )


def _counted(found: Names, noun: str) -> str:
    return f"{found.count:,} {noun}{'s' if found.count > 1 else ''}"


@dataclass(frozen=True)
class Sorted:
    """The names of a source or folder, sorted out. Captions and masks are by the picture's name."""

    pictures: Sequence[str]
    captions: Mapping[str, str]
    masks: Mapping[str, str]


def sort_out(
    files: Sequence[str],
    source: Source,
    remarks: Remarks,
    notices: Notices,
    name_of: Callable[[str], str],
    key_of: Callable[[str], str] | None = None,
) -> Sorted:
    """Tells pictures, captions, masks and other files apart by their names, which may be paths, and matches them.

    `key_of` gives another stem for pictures for which there is nothing under their own. What belongs to nothing goes to
    the notices, under the name that `name_of` gives it.
    """
    endings = tuple(ending.lower() for ending in source.caption_extensions)
    texts = sorted(name for name in files if name.lower().endswith(endings)) if endings else []
    rest = sorted(set(files).difference(texts) if texts else files, key=os.fsencode)
    pictures = stems(name for name in rest if is_picture(name))
    remarks.others.update(extension(name) for name in rest if name not in pictures)
    masks = _take_masks(pictures, source.masks == "files", notices, name_of)
    kinds = [with_ending(texts, ending) for ending in source.caption_extensions]
    captions = match(pictures, kinds)
    if key_of:
        more = match({name: key_of(name) for name in pictures if name not in captions.of}, kinds)
        captions = Matches({**captions.of, **more.of}, {*captions.known, *more.known})
    for group in _shared(pictures, captions.of):
        notices.shared.add(" and ".join(map(name_of, group)))
    for text in (text for text in texts if text not in captions.known):
        notices.orphans.add(name_of(text))
    return Sorted(list(pictures), captions.of, masks)


def _take_masks(pictures: dict[str, str], wanted: bool, notices: Notices, name_of: Callable[[str], str]) -> Mapping[str, str]:
    """Takes masks out of the pictures, and matches them. Unless masks are wanted, only what lies beside its picture is one."""
    bases = {name: found for name in pictures if (found := mask_base(name)) and (wanted or found[0] < len(MASK_ENDINGS))}
    if not bases:
        return {}
    rest = {name: stem for name, stem in pictures.items() if name not in bases}
    kinds: list[dict[str, str]] = [{} for _ in range(len(MASK_ENDINGS) + 1)]
    for name, (way, base) in bases.items():
        kinds[way].setdefault(base, name)
    matches = match(rest, kinds)
    present = set(rest.values())
    for name in sorted(name for name, (_, base) in bases.items() if wanted or name in matches.known or base in present):
        del pictures[name]
        if not wanted:
            notices.masks_unused.add(name_of(name))
        elif name not in matches.known:
            notices.masks_without.add(name_of(name))
    return matches.of if wanted else {}


@dataclass(frozen=True)
class Matches:
    """What belongs to each picture, by the picture's name; and all that belongs to some picture, though another kind was preferred."""

    of: Mapping[str, str]
    known: Collection[str]


def match(pictures: Mapping[str, str], kinds: Sequence[Mapping[str, str]]) -> Matches:
    """Matches `pictures` (name -> stem) with what has the same stem, of the first of the kinds (stem -> name) that has it.

    Within a kind the same stem wins over one that is the same but for case and Unicode form.
    """
    of: dict[str, str] = {}
    known: set[str] = set()
    for kind in kinds:
        found = {name: kind[stem] for name, stem in pictures.items() if stem in kind}
        if kind and len(found) < len(pictures):
            alike = {_fold(stem): name for stem, name in kind.items()}
            rest = ((name, _fold(stem)) for name, stem in pictures.items() if name not in found)
            found.update((name, alike[key]) for name, key in rest if key in alike)
        known.update(found.values())
        of = {**found, **of} if of else found
    return Matches(of, known)


def _shared(pictures: Iterable[str], of: Mapping[str, str]) -> list[list[str]]:
    """The groups of pictures that have one side file together."""
    groups: dict[str, list[str]] = {}
    if len(set(of.values())) < len(of):
        for picture in pictures:
            if picture in of:
                groups.setdefault(of[picture], []).append(picture)
    return [group for group in groups.values() if len(group) > 1]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
