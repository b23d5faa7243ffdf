"""The only place that writes files: temporary name, fsync, rename, digest.

A reader sees the old file or the new one, never a part of one; what was acknowledged survives a power cut on a local
POSIX disk. Folders are published the same way, manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aquatint.errors import LockedError, StorageError

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")
_IN_USE = "in-use.lock"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the file, the cause and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = {
            errno.ENOSPC: "free some space on that disk, or point the config at another one",
            errno.EDQUOT: "the disk quota is used up: free some space, or point the config at another disk",
            errno.EACCES: "give this user permission there, or choose another folder in the config",
            errno.EROFS: "that file system is read-only: choose another folder in the config",
        }.get(error.errno or 0, "check that the disk is mounted and healthy, then run the same command again")
        raise StorageError(f"could not {action} {path}: {reason}", hint=hint) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well. Raises StorageError."""
    path = Path(path)
    with storage_errors("write", path):
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        make_folder(target.parent)
        temporary = _temporary_name(target)
        file = open(temporary, "xb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is the news
                file.close()
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Makes a folder and its missing parents, each durable before the next. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. What is not a character (a byte of a strange file name) is written as `\\udcXX`, which JSON reads back."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Appends whole lines. A failed write is taken back; a crash can cut the last line: readers skip a line without an end."""
    with storage_errors("append to", path):
        make_folder(path.parent)
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, text.encode(errors="backslashreplace"))
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise


def _write_all(file: BinaryIO, data: bytes) -> None:
    """One write may take a part only: a nearly full disk, a signal."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears under `path` only when the block ends well. Raises StorageError, also if it exists."""
    path = Path(path)
    temporary = _temporary_name(path)
    with storage_errors("write", path):
        if path.exists():
            raise StorageError(f"{path} exists already", hint="choose another name; nothing is ever overwritten there")
        make_folder(path.parent)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, _ in os.walk(temporary, topdown=False):
                sync_folder(Path(folder))
            os.rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Removes a folder of ours so that a crash leaves the whole of it or a temporary name, never a part."""
    with storage_errors("remove", path):
        doomed = _temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def remove_file(path: Path) -> None:
    """Removes a file of ours; it is no error if another process was faster."""
    with storage_errors("remove", path):
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *, older_than_seconds: float = 0.0) -> None:
    """Removes what a crash left behind: names that only this module makes.

    The caller holds the folder's lock, or names an age that no write in progress has.
    """
    if not folder.is_dir():
        return
    with storage_errors("clean", folder):
        for entry in folder.iterdir():
            if TEMPORARY.search(entry.name) and _age_seconds(entry) >= older_than_seconds:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)


def _age_seconds(path: Path) -> float:
    """Seconds since the last change; at least 0, also for a file from the future; negative for one that is gone."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except FileNotFoundError:
        return -1.0


def digest_file(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with storage_errors("read", path), open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write on the disk that holds `folder` (or its nearest existing parent)."""
    folder = Path(folder).absolute()
    with storage_errors("measure", folder):
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def check_writable(folder: Path) -> None:
    """Raises StorageError if a file cannot be made in `folder`; creates the folder if it is missing."""
    with storage_errors("write to", folder):
        make_folder(folder)
        probe = _temporary_name(folder / "probe")
        with open(probe, "xb"):
            pass
        probe.unlink()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the kernel lets go of it however the process ends. Raises LockedError."""
    with storage_errors("lock", folder):
        make_folder(folder)
        file = open(folder / ".lock", "ab")
    with file:
        with storage_errors("lock", folder):
            held = _try_lock(file)
        if not held:
            raise LockedError(
                f"another process is working in {folder}",
                hint="wait for it to end, stop it, or give this run another name with run.name=...",
            )
        os.register_at_fork(after_in_child=file.close)  # or a worker would hold the folder when this process is killed
        yield


@contextlib.contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Says that this process relies on what is in a folder. Any number may; nobody removes anything meanwhile. Raises LockedError.

    In a folder that this user cannot write to, and where nobody has left the lock's file, there is nothing to hold.
    """
    file = _open_shared(folder / _IN_USE)
    with file or contextlib.nullcontext():
        if file is not None:
            with storage_errors("lock", folder):
                held = _try_lock(file, fcntl.LOCK_SH)
            if not held:
                raise LockedError(f"another process is tidying up in {folder}", hint="wait for it to end, then run the same command again")
            os.register_at_fork(after_in_child=file.close)
        yield


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds a folder that no process relies on, so that things in it may be removed. Raises LockedError while one does."""
    with storage_errors("lock", folder):
        make_folder(folder)
        file = open(folder / _IN_USE, "a+b")
    with file:
        with storage_errors("lock", folder):
            held = _try_lock(file)
        if not held:
            raise LockedError(f"{folder} is in use by another process", hint="wait for the run that uses it to end, or stop it")
        os.register_at_fork(after_in_child=file.close)
        yield


def _open_shared(path: Path) -> BinaryIO | None:
    with storage_errors("lock", path.parent):
        try:
            make_folder(path.parent)
            return open(path, "a+b")  # network disks want it readable for a shared lock, and writable for the other one
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            return open(path, "rb") if path.exists() else None


def _try_lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
