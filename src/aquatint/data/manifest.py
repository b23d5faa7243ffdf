"""From folders to one table: every picture with its caption, size and digest, and every file that cannot be used, with the reason.

Nothing is ever lost in silence: listed = used + rejected. Files are only read.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from aquatint.data.captions import MAX_CAPTION_BYTES, BadCaption, decode_caption
from aquatint.data.image import BadImage, digest_picture, quiet_decoders, read_header
from aquatint.data.sources.folder import Listing, list_folder
from aquatint.errors import DataError, StorageError

_THREADS = 8  # enough to keep a disk busy; hashing and reading run outside Python's lock
_FILES_AT_ONCE = 4096
_CAPTION_ENDINGS = (".txt", ".caption", ".captions", ".tags", ".tag", ".text", ".cap", ".prompt")  # what other tools write


@dataclass(frozen=True)
class Source:
    """A folder of pictures. The caption of `a.jpg` is in `a` + `caption_extension`; each picture counts `repeats` times."""

    folder: Path
    caption_extension: str = ".txt"
    repeats: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture that can be used. `digest` is the BLAKE2b-128 of the file's bytes, in hex; `size_hw` is upright.

    `caption` is None without a side file. `name` is for people: the path from its source's folder on, always printable.
    """

    path: Path
    name: str
    digest: str
    size_hw: tuple[int, int]
    caption: str | None
    repeats: int


@dataclass(frozen=True)
class Rejected:
    """A file that cannot be used. `reason` reads well after the name; `digest` is None if the file could not be read."""

    name: str
    path: Path
    reason: str
    digest: str | None


@dataclass(frozen=True)
class Manifest:
    """Everything that was found, in the order of the sources and then of the paths.

    `warnings` are about what is used, but perhaps not as meant. `others` counts the files left alone, by extension.
    """

    pictures: tuple[Picture, ...]
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def listed(self) -> int:
        return len(self.pictures) + len(self.rejected)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    caption: Path | None
    repeats: int


def scan(
    sources: Sequence[Source],
    *,
    max_pixels: int,
    quarantine: Mapping[str, str],
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Lists the sources, then reads every picture's bytes (for the digest), header and caption, in threads.

    `quarantine` has contents that could not be decoded earlier, digest -> reason. `on_progress` gets files done and
    files in all. Raises DataError for a folder that is missing or has no pictures.
    """
    files: list[_File] = []
    warnings: list[str] = []
    others: Counter[str] = Counter()
    for source in sources:
        listing = _list(source)
        warnings.extend(_listing_warnings(source, listing))
        others.update({**listing.others, "hidden": listing.hidden})
        files.extend(_File(path, name_of(path, source.folder), listing.captions.get(path), source.repeats) for path in listing.paths)
    found: list[Picture | Rejected] = []
    remarks: dict[str, list[str]] = {}
    for result, texts in _examine_all(files, max_pixels, quarantine):
        found.append(result)
        for text in texts:
            remarks.setdefault(text, []).append(result.name)
        if on_progress:
            on_progress(len(found), len(files))
    pictures = tuple(result for result in found if isinstance(result, Picture))
    warnings.extend(f"{_some(names, 20)}: {text}" for text, names in remarks.items())
    warnings.extend([*_overlaps(sources, files), *_copies(pictures)])
    return Manifest(pictures, tuple(result for result in found if isinstance(result, Rejected)), tuple(warnings), +others)


# What the names say


def _list(source: Source) -> Listing:
    if not source.folder.is_dir():
        what = "is not a folder" if source.folder.exists() else "does not exist"
        raise DataError(f"the picture folder {source.folder} {what}", hint="correct the path in data.sources")
    listing = list_folder(source.folder, source.caption_extension)
    if not listing.paths:
        content = f"it holds only {_counted(listing.others)}" if listing.others else "it is empty"
        raise DataError(
            f"there are no pictures in {source.folder}: {content}", hint="put pictures there, or correct the path in data.sources"
        )
    return listing


def name_of(path: Path, folder: Path) -> str:
    """The path from the source's folder on, with anything unprintable escaped."""
    name = (Path(folder.name) / path.relative_to(folder)).as_posix()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def _listing_warnings(source: Source, listing: Listing) -> Iterator[str]:
    for problem in listing.unreadable:
        yield f"a folder could not be listed, and nothing in it is used: {problem}"
    if listing.shared:
        groups = [" and ".join(name_of(path, source.folder) for path in group) for group in listing.shared]
        yield f"pictures of the same name share one caption; rename them if that is not meant: {_some(groups, 20)}"
    if listing.orphans:
        names = [name_of(path, source.folder) for path in listing.orphans]
        yield f"{len(names)} caption {_files(len(names))} in {source.folder} without a picture: {_some(names, 20)}"


def _overlaps(sources: Sequence[Source], files: Sequence[_File]) -> Iterator[str]:
    """Sources that lie in one another, which is easily done to repeat some pictures more often, and counts them twice."""
    folders = {source.folder: source.folder.resolve() for source in sources}
    for inner, inner_place in folders.items():
        for outer, outer_place in folders.items():
            if inner != outer and inner_place.is_relative_to(outer_place):
                count = sum(1 for file in files if file.path.is_relative_to(inner))
                yield f"the source {inner} lies in the source {outer}, and both use its pictures ({count} uses in all)"


def _copies(pictures: Sequence[Picture]) -> Iterator[str]:
    counts = Counter(picture.digest for picture in pictures)
    copies = [picture.name for picture in pictures if counts[picture.digest] > 1]
    if copies:
        yield f"{len(copies)} pictures have an exact copy: {_some(copies, 20)}"


# What the files say


def _examine_all(
    files: Sequence[_File], max_pixels: int, quarantine: Mapping[str, str]
) -> Iterator[tuple[Picture | Rejected, tuple[str, ...]]]:
    """Results in the order of `files`. In portions, so that a million files do not wait in memory."""
    with quiet_decoders(), ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), _FILES_AT_ONCE):
            yield from pool.map(lambda file: _examine(file, max_pixels, quarantine), files[start : start + _FILES_AT_ONCE])


def _examine(file: _File, max_pixels: int, quarantine: Mapping[str, str]) -> tuple[Picture | Rejected, tuple[str, ...]]:
    """The picture, or why it is none; and remarks about it."""
    digest = None
    try:
        digest = digest_picture(file.path)
        if digest in quarantine:
            return Rejected(file.name, file.path, quarantine[digest], digest), ()
        header = read_header(file.path, max_pixels)
        caption, remark = _read_caption(file.caption)
    except (BadImage, BadCaption) as error:
        return Rejected(file.name, file.path, str(error), digest), ()
    except OSError as error:
        return Rejected(file.name, file.path, _unreadable(file.path, error), digest), ()
    except StorageError as error:
        return Rejected(file.name, file.path, error.message, digest), ()
    remarks = (*header.notices, *([remark] if remark else []))
    return Picture(file.path, file.name, digest, header.size_hw, caption, file.repeats), remarks


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return "is a link to a file that does not exist"
    return f"cannot be read: {error.strerror or error}"


def _read_caption(path: Path | None) -> tuple[str | None, str | None]:
    if path is None:
        return None, None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadCaption("is not a plain file")
        with path.open("rb") as file:
            text, remark = decode_caption(file.read(MAX_CAPTION_BYTES + 1))
    except OSError as error:
        raise BadCaption(f"its caption {path.name} {_unreadable(path, error)}") from error
    except BadCaption as error:
        raise BadCaption(f"its caption {path.name} {error}") from error
    return text, f"its caption {remark}" if remark else None


# Limits and the hold-out


def check_limits(manifest: Manifest, *, max_bad_share: float, max_uncaptioned_share: float) -> None:
    """Raises DataError if more than these shares are bad or have no caption, or if nothing can be used.

    One bad picture is always allowed, unless `max_bad_share` is 0. An empty caption counts as none.
    """
    bad = [f"{one.name} ({one.reason})" for one in manifest.rejected]
    if not manifest.pictures:
        raise DataError(f"none of the {manifest.listed} pictures can be used: {_some(bad)}", hint="see whether other programs open them")
    if len(bad) > max(1 if max_bad_share > 0 else 0, _share_of(manifest.listed, max_bad_share)):
        raise DataError(
            f"{len(bad)} of {manifest.listed} pictures cannot be used, more than the {max_bad_share:.1%} that data.max_bad_share"
            f" allows: {_some(bad)}",
            hint="repair them or move them away, or raise data.max_bad_share to train without them",
        )
    bare = [picture.name for picture in manifest.pictures if not picture.caption]
    if len(bare) > _share_of(len(manifest.pictures), max_uncaptioned_share):
        raise DataError(
            f"{len(bare)} of {len(manifest.pictures)} pictures have no caption, more than the {max_uncaptioned_share:.1%} that"
            f" data.max_uncaptioned_share allows: {_some(bare)}",
            hint=f"{_other_endings(manifest.others)}, or set data.max_uncaptioned_share = 1 to train without captions",
        )


def _share_of(count: int, share: float) -> int:
    return int(share * count + 1e-9)  # 0.29 * 100 is a little less than 29


def _other_endings(others: Mapping[str, int]) -> str:
    found = {ending: others[ending] for ending in _CAPTION_ENDINGS if ending in others}
    if not found:
        return "write them"
    return f"set caption_extension in data.sources if the other files there ({_counted(found)}) are the captions"


def split(manifest: Manifest, *, share: float, max_pictures: int) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """Training pictures and held-out pictures, each in the manifest's order.

    A content is held out if its digest, as a number in 0..1, is below `share`: other pictures coming or going do not
    change that, and all copies are on one side. If that picks none, the lowest is taken; never more than `max_pictures`
    pictures or half of the contents. A `share` of 0 holds out nothing.
    """
    copies = Counter(picture.digest for picture in manifest.pictures)
    by_number = sorted(copies, key=lambda digest: (_number(digest), digest))
    picked = [digest for digest in by_number if _number(digest) < share] or by_number[: 1 if share > 0 else 0]
    held: set[str] = set()
    room = max_pictures
    for digest in picked[: len(by_number) // 2]:
        if copies[digest] <= room:
            held.add(digest)
            room -= copies[digest]
    return (
        tuple(picture for picture in manifest.pictures if picture.digest not in held),
        tuple(picture for picture in manifest.pictures if picture.digest in held),
    )


def _number(digest: str) -> float:
    """The first 52 bits of a hex digest as a number in [0, 1)."""
    return int(digest[:13], 16) / 16.0**13


# Text


def ledger_text(manifest: Manifest) -> str:
    """Every picture accounted for: how many are used, and each one that is not, with its reason."""
    captioned = sum(1 for picture in manifest.pictures if picture.caption)
    lines = [
        f"{manifest.listed} pictures listed = {len(manifest.pictures)} used + {len(manifest.rejected)} quarantined",
        f"{captioned} have a caption, {len(manifest.pictures) - captioned} have none",
    ]
    lines += _section("Quarantined (left where they are, unchanged)", [f"{one.name}: {one.reason}" for one in manifest.rejected])
    lines += _section("Warnings", manifest.warnings)
    lines += _section("Left alone", [_counted(manifest.others)] if manifest.others else [])
    return "\n".join(lines) + "\n"


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []


def _some(names: Sequence[str], count: int = 5) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def _counted(extensions: Mapping[str, int]) -> str:
    ordered = sorted(extensions.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {extension or 'without an ending'}" for extension, count in ordered)


def _files(count: int) -> str:
    return "file" if count == 1 else "files"
