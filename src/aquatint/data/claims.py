"""Claims: which process is at which piece of work in a folder that several fill together.

A claim is a lock of the kernel on a small file, so it ends with its process, however that ends. It saves work and guards
nothing: what two processes do at once is done twice, with the same result.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from aquatint.storage import append_text, remove_file, storage_errors

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # network disks that have none: there, work may be done twice


@dataclass(frozen=True)
class Claim:
    """A piece of work that is this process's own until it is released."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Removes the file, then the lock: nobody gets a lock on a file that is still named. Raises StorageError."""
        try:
            remove_file(self.path)
        finally:
            os.close(self.descriptor)


def try_claim(path: Path) -> Claim | None:
    """The claim that stands for `path`, or None if another process has it. Makes missing folders. Raises StorageError."""
    with storage_errors("lock", path):
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR)  # NFS locks only what could be written to
            except FileNotFoundError:
                append_text(path, f"process {os.getpid()} on {socket.gethostname()}\n")
                continue
            try:
                if not _lock(descriptor):
                    os.close(descriptor)
                    return None
                if _is_named(descriptor, path):
                    return Claim(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder has removed it after we opened it


def remove_abandoned(folder: Path) -> None:
    """Removes the files of claims that nobody has any more. Raises StorageError."""
    with storage_errors("clean", folder):
        paths = sorted(folder.glob("*.lock")) if folder.is_dir() else []
    for path in paths:
        if (claim := try_claim(path)) is not None:
            claim.release()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
