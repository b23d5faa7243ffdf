"""The only place that writes files: temporary name, fsync, rename, digest.

A reader sees the old file or the new one, never a part of one; what was acknowledged survives a power cut on a local
POSIX disk. Folders are published the same way, manifest last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aquatint.errors import StorageError

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")


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
            28: "free some space on that disk, or point the config at another one",
            122: "the disk quota is used up: free some space, or point the config at another disk",
            13: "give this user write permission there, or choose another folder in the config",
            30: "that file system is read-only: choose another folder in the config",
        }.get(error.errno or 0, "check that the disk is mounted and healthy, then run the same command again")
        raise StorageError(f"could not {action} {path}: {reason}", hint=hint) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well. Raises StorageError."""
    path = Path(path)
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        temporary = _temporary_name(target)
        file = open(temporary, "xb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Appends whole lines in one write. A crash can cut the last line: readers skip a line without an end."""
    with storage_errors("append to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears under `path` only when the block ends well. Raises StorageError, also if it exists."""
    path = Path(path)
    temporary = _temporary_name(path)
    with storage_errors("write", path):
        if path.exists():
            raise StorageError(f"{path} exists already", hint="choose another name; nothing is ever overwritten there")
        temporary.mkdir(parents=True)
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


def remove_temporaries(folder: Path) -> None:
    """Removes what a crash left behind: names that only this module makes. The caller holds the folder's lock."""
    if not folder.is_dir():
        return
    with storage_errors("clean", folder):
        for entry in folder.iterdir():
            if TEMPORARY.search(entry.name):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


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
    while not folder.exists():
        folder = folder.parent
    with storage_errors("measure", folder):
        return shutil.disk_usage(folder).free


def check_writable(folder: Path) -> None:
    """Raises StorageError if a file cannot be made in `folder`; creates the folder if it is missing."""
    with storage_errors("write to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(20, "not a folder", str(folder))
        probe = _temporary_name(folder / "probe")
        with open(probe, "xb"):
            pass
        probe.unlink()
