"""Tar files of pictures with captions beside them, as WebDataset packs them. Only headers are read, and nothing is unpacked.

A picture is a range of its tar, so that any of them can be read at any time. Its caption is the member with the same name
but for the extension, or else the one with the same WebDataset key: the name up to its first dot. What else a tar can hold
(links, devices, names that lead out of it, pickles) is never followed, opened or decoded.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

from aquatint.data.downloads import glob_remote, is_url, public_name
from aquatint.data.places import Identity, Opener, Place
from aquatint.data.sources.listing import Entry, Remarks, Source
from aquatint.data.sources.names import Names, extension, is_picture, printable
from aquatint.data.sources.side_files import Notices, sort_out
from aquatint.errors import DataError

MAX_HEADER_BYTES = 1 << 20  # of one member: long names and the like; more would only fill the memory
_MAX_FILES = 100_000  # that braces may stand for
_AHEAD = 4  # downloads at once
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def containers(source: Source, opener: Opener) -> tuple[str, ...]:
    """The tar files, sorted: `path` is one of them, a folder of them, or has `*` or `{000..123}` in it. Raises DataError."""
    paths = sorted(set(_expand(source.path)), key=os.fsencode)
    if not paths:
        raise DataError(f"there is no tar file {public_name(source.path)}", hint="correct the path in data.sources")
    return tuple(paths)


def list_tars(source: Source, opener: Opener, remarks: Remarks) -> Iterator[Entry]:
    """The pictures of all tars, in the order in which they lie there; members that cannot be used become problems.

    Of a tar that is cut off or damaged, what comes before the damage is used, and the tar is a problem. Tars behind URLs
    are downloaded. Raises DataError for a tar that is not there, cannot be read or is compressed, StorageError.
    """
    notices = Notices()
    for path, ready in _ready(containers(source, opener), opener):
        try:
            yield from _list_one(path, ready(), source, opener, remarks, notices)
        except OSError as error:
            raise DataError(
                f"the tar file {public_name(path)} cannot be read: {error.strerror or error}",
                hint="check the path in data.sources, and who may read it",
            ) from error
    remarks.warnings.extend(notices.texts(source))


# Which files


def _expand(path: str) -> Iterator[str]:
    if is_url(path):
        for one in _braces(f"{path}*.tar" if path.endswith("/") else path):
            yield from glob_remote(one) if "*" in one else [one]
    elif Path(path).is_dir():
        yield from map(str, Path(path).glob("*.tar"))
    elif Path(path).exists():
        yield path
    else:
        for one in _braces(path):
            yield from glob(one, recursive=True) if re.search(r"[*?[]", one) else [one]  # noqa: PTH207


def _braces(path: str) -> Iterator[str]:
    """The paths that `{000..123}` and `{a,b}` stand for, as in a shell. Raises DataError for too many."""
    waiting, found = [path], 0
    while waiting:
        one = waiting.pop()
        braces = _BRACES.search(one)
        if braces is None:
            found += 1
            yield one
            continue
        first, last, words = braces.groups()
        parts: Sequence[str] = words.split(",") if words else _range(first, last)
        if found + len(waiting) + len(parts) > _MAX_FILES:
            raise DataError(f"{public_name(path)} stands for more than {_MAX_FILES:,} files", hint="correct the path in data.sources")
        waiting.extend(f"{one[: braces.start()]}{part}{one[braces.end() :]}" for part in parts)


def _range(first: str, last: str) -> list[str]:
    low, high = sorted((int(first), int(last)))
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return [str(number).zfill(width) for number in range(low, min(high, low + _MAX_FILES) + 1)]


def _ready(paths: Sequence[str], opener: Opener) -> Iterator[tuple[str, Callable[[], Identity]]]:
    """Each path, and what waits until that version of the file is on this machine; the next few come in the meantime."""

    def prepare(path: str) -> Identity:
        identity = opener.identity(path)  # first: the copy is of the version that was asked for last
        opener.local(path)
        return identity

    if not any(map(is_url, paths)):
        yield from ((path, partial(prepare, path)) for path in paths)
        return
    with ThreadPoolExecutor(_AHEAD) as threads:
        coming: deque[tuple[str, Future[Identity]]] = deque()
        for path in paths:
            coming.append((path, threads.submit(prepare, path)))
            if len(coming) > _AHEAD:
                name, future = coming.popleft()
                yield name, future.result
        yield from ((name, future.result) for name, future in coming)


# What is in them


@dataclass
class _Tar:
    """A tar while it is read: the ranges of its plain members by name, and the members that are skipped without being pictures."""

    path: str
    source: Source
    remarks: Remarks
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: Names = field(default_factory=Names)

    @property
    def label(self) -> str:
        return printable(public_name(self.path).rpartition("/")[2])

    def name(self, member: str) -> str:
        return f"{self.label}/{printable(member)}"

    def skip(self, member: str, reason: str) -> None:
        """A picture is a problem; a caption is only told of, as its picture is still there; the rest is counted."""
        if is_picture(member):
            self.remarks.problems.append((self.name(member), reason))
        elif member.lower().endswith(tuple(ending.lower() for ending in self.source.caption_extensions)):
            self.skipped.add(f"{self.name(member)} ({reason})")
        else:
            self.remarks.others[extension(member)] += 1


def _list_one(path: str, identity: Identity, source: Source, opener: Opener, remarks: Remarks, notices: Notices) -> Iterator[Entry]:
    tar = _Tar(path, source, remarks)
    with opener.open(Place(path)) as file:
        if damage := _read_members(file, tar):
            remarks.problems.append((tar.label, damage))
    if tar.skipped.count:
        remarks.warnings.append(f"captions that cannot be used, so that their pictures have none: {tar.skipped}")
    hidden = [name for name in tar.members if any(part.startswith(".") for part in name.split("/"))]
    if hidden:
        remarks.others["hidden"] += len(hidden)
    visible = list(tar.members.keys() - set(hidden)) if hidden else list(tar.members)
    found = sort_out(visible, source, remarks, notices, tar.name, _webdataset_key)
    for name in sorted(found.pictures, key=lambda name: tar.members[name]):
        caption, mask = found.captions.get(name), found.masks.get(name)
        yield Entry(
            tar.name(name),
            Place(path, *tar.members[name]),
            identity,
            caption=Place(path, *tar.members[caption]) if caption else None,
            caption_identity=identity if caption else None,
            mask=Place(path, *tar.members[mask]) if mask else None,
            mask_identity=identity if mask else None,
        )


def _webdataset_key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


class _Headers:
    """A tar for `tarfile`, which would read any amount as one header if a damaged file says so."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _read_members(file: BinaryIO, tar: _Tar) -> str:
    """Takes in the headers. Returns what is wrong with the tar, or nothing. Raises DataError for a compressed one, OSError."""
    start = file.read(6)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{public_name(tar.path)} is compressed, so that no single picture can be read from it",
                hint=f"unpack it once with {command}: pictures are compressed themselves, and it will hardly be larger",
            )
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    end = 0
    try:
        archive: Any = tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:")  # noqa: SIM115 - it holds nothing but the file
        while (member := archive.next()) is not None:
            archive.members = []  # or it would keep them all
            if member.size < 0 or member.offset_data < end or archive.offset <= member.offset:
                return _damaged(end)
            end = archive.offset
            _take(member, size, tar)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError, KeyError):
        return _damaged(end)
    return _look_behind(file, end, tar)


def _damaged(end: int) -> str:
    return f"is damaged or cut off at byte {end:,}; the members after it are lost"


def _look_behind(file: BinaryIO, end: int, tar: _Tar) -> str:
    """What `tarfile` does not say: whether what stands behind the last member is the end, or a header that cannot be read."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        return _damaged(end)
    if len(block) < tarfile.BLOCKSIZE:
        tar.remarks.warnings.append(f"{tar.label} has no end mark: if it was cut off there, the members after it are lost")
    return ""


def _take(member: tarfile.TarInfo, size: int, tar: _Tar) -> None:
    """Adds a member that is a plain file under a decent name; skips any other. A tar of `size` bytes."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    name = "/".join(parts)
    if member.isdir() or not parts:
        return
    if member.name.startswith("/") or ".." in parts:
        tar.skip(name, "its name leads out of the archive")
    elif member.issym() or member.islnk():
        tar.skip(name, "is a link, which is not followed")
    elif member.issparse():
        tar.skip(name, "is a sparse file, which is not stored in one piece")
    elif not member.isreg():
        tar.skip(name, "is not a plain file")
    elif name in tar.members:
        tar.skip(name, "is in the archive twice; the first one is used")
    elif member.offset_data + member.size > size:
        tar.skip(name, "the archive ends before it does")
    elif not member.size and is_picture(name):
        tar.skip(name, "the file is empty")
    else:
        tar.members[name] = member.offset_data, member.size
