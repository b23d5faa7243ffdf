"""Where bytes lie, and how they are opened: local files, parts of files, cells of Parquet tables, and URLs."""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aquatint.data.cells import Cells
from aquatint.data.downloads import Downloads, is_url


@dataclass(frozen=True, slots=True)
class Place:
    """A whole file, a part of one (a member of a tar), or a cell of a Parquet column.

    `path` is a local path, or a URL (it has `://`). `start` and `length` are in bytes, a `length` of -1 reaching to the
    end; with `column` set, `start` is the row.
    """

    path: str
    start: int = 0
    length: int = -1
    column: str = ""


class Identity(NamedTuple):
    """What tells a file from an earlier version of it without reading it: any difference means that it is read again."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Opener:
    """Opens places for reading. Picklable, and any number of threads may share one.

    `downloads` is the folder for copies of what lies behind URLs. A URL is asked once whether its copy is still good, and
    again by `identity`; copies of an opener, also in other processes, go by what it was told.
    """

    def __init__(self, downloads: Path | None = None) -> None:
        self.downloads = Downloads(downloads)
        self._cells = Cells()

    def open(self, place: Place) -> BinaryIO:
        """A seekable, read-only binary file; its end is the end of the place.

        Raises OSError for what is not there, cannot be read, is shorter than the place or not a plain file (a pipe would
        block for ever), with a reason that reads well after `cannot be read:`; StorageError for trouble with downloads.
        """
        path = self.local(place.path)
        if place.column:
            return self._cells.open(path, place.column, place.start)
        if place.start == 0 and place.length < 0:
            stat_plain(path)
            return open(path, "rb", opener=_open_unblocked)
        return _open_range(path, place.start, place.length)

    def identity(self, path: str) -> Identity:
        """The present identity of a whole plain file. Raises OSError, and StorageError for a URL that cannot be asked."""
        if is_url(path):
            size, validator = self.downloads.identity(path)
            return Identity(size, 0, 0, validator)
        return identity_of(stat_plain(path))

    def local(self, path: str) -> str:
        """The path itself, or that of a whole and unchanged copy of what lies behind the URL, downloaded if need be."""
        return str(self.downloads.fetch(path)) if is_url(path) else path


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def stat_plain(path: str) -> os.stat_result:
    """Raises OSError, also for folders, pipes, sockets and devices."""
    status = os.stat(path)  # noqa: PTH116 - a million times
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", path)
    return status


def _open_unblocked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what became a pipe since it was looked at must not block either


# Parts of files


def _open_range(path: str, start: int, length: int) -> BinaryIO:
    size = stat_plain(path).st_size
    end = size if length < 0 else start + length
    if start < 0 or max(start, end) > size:
        raise _too_short(path)
    return io.BufferedReader(_Range(path, start, end), 1 << 16)


def _too_short(path: str) -> OSError:
    return OSError(errno.EIO, "the file that holds it is shorter than when it was listed", path)


class _Range(io.RawIOBase):
    """Bytes `start … end - 1` of a file, as a file. A file that was cut off since then is an error, and not an early end."""

    def __init__(self, path: str, start: int, end: int) -> None:
        self.name = path
        self._start, self._end, self._position = start, end, start
        self._descriptor = _open_unblocked(path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: self._start, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        if base + offset < self._start:
            raise OSError(errno.EINVAL, "a position before the start", self.name)
        self._position = base + offset
        return self._position - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._end - self._position)]
        if not view:
            return 0
        count = os.preadv(self._descriptor, [view], self._position)
        if not count:
            raise _too_short(self.name)
        self._position += count
        return count

    def readall(self) -> bytes:
        data = bytearray(max(0, self._end - self._position))
        done = 0
        while done < len(data):
            done += self.readinto(memoryview(data)[done:])
        return bytes(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)
