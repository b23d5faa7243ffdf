"""What is written is there whole, or not at all: each operation is made to fail, to fail for good, and to be the last one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aquatint import storage
from aquatint.errors import LockedError, StorageError

OLD, NEW = b"old" * 5000, b"new!" * 5000  # each more than one buffer


class Crash(BaseException):
    """The process is gone: nothing after this touches the disk, no clean-up either."""


class Disk:
    """Stands before the disk operations of `storage`. `log` has those that were done; number `at` (from 1) fails.

    If the trouble is lasting, all that come after it fail too, with another error.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.fail(0, errno.EIO)
        for name in ("replace", "rename", "mkdir", "open", "unlink", "rmdir"):
            patch.setattr(os, name, self._guarded(name, getattr(os, name)))
        patch.setattr(os, "fsync", self._guarded("fsync", lambda descriptor: None))  # no test could tell, and it is slow
        patch.setattr(storage, "open", self._open, raising=False)

    def fail(self, at: int, error: int | type[Crash], *, lasting: bool = False) -> None:
        self.at, self.error, self.lasting, self.count = at, error, lasting or error is Crash, 0
        self.log.clear()

    def tick(self, name: str) -> None:
        self.count += 1
        if self.at and (self.count == self.at or (self.lasting and self.count > self.at)):
            if not isinstance(self.error, int):
                raise self.error
            error = self.error if self.count == self.at else errno.EIO
            raise OSError(error, os.strerror(error))
        self.log.append(name)

    def _guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.tick(name)
            return real(*args, **named)

        return call

    def _open(self, path: Path, mode: str, buffering: int = -1) -> Any:
        self.tick("create")
        raw = ShortWrites(path, mode.replace("b", ""))
        raw.disk = self
        return io.BufferedWriter(raw) if buffering else raw


class ShortWrites(io.FileIO):
    """Takes only a half of what it is given, which every file may do."""

    disk: Disk

    def write(self, data: Any) -> int:
        self.disk.tick("write")
        return super().write(bytes(data)[: len(data) // 2 + 1])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sweep(disk: Disk, attempt: Callable[[], None], error: int | type[Crash], *, lasting: bool = False) -> Iterator[BaseException]:
    """Lets operation 1, 2, … of `attempt` fail until it passes; yields what it raised each time."""
    for at in range(1, 100):
        disk.fail(at, error, lasting=lasting)
        try:
            attempt()
        except (StorageError, Crash) as problem:
            disk.at = 0
            yield problem
        else:
            assert at > 5, "the sweep must reach every operation"
            return
    raise AssertionError("it never passed")


# Files


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path, disk: Disk, error: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    for problem in sweep(disk, lambda: storage.write_bytes(path, NEW), error):
        assert isinstance(problem, StorageError)
        assert problem.message == f"could not write {path}: {os.strerror(error)}"
        assert path.read_bytes() == (NEW if "replace" in disk.log else OLD)
        assert files(tmp_path) == ["file"]
        path.write_bytes(OLD)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_stays_broken_is_reported_by_its_first_error(tmp_path: Path, disk: Disk, error: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    for problem in sweep(disk, lambda: storage.write_bytes(path, NEW), error, lasting=True):
        assert isinstance(problem, StorageError)
        assert os.strerror(error) in problem.message
        assert path.read_bytes() == (NEW if "replace" in disk.log else OLD)
        path.write_bytes(OLD)
        storage.remove_temporaries(tmp_path)


def test_a_crash_at_any_moment_leaves_the_old_or_the_new_file(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    for _ in sweep(disk, lambda: storage.write_bytes(path, NEW), Crash):
        assert path.read_bytes() == (NEW if "replace" in disk.log else OLD)
        storage.remove_temporaries(tmp_path)
        assert files(tmp_path) == ["file"]
        path.write_bytes(OLD)


def test_the_bytes_are_synced_before_the_name_and_the_name_before_the_end(tmp_path: Path, disk: Disk) -> None:
    storage.write_bytes(tmp_path / "file", NEW)
    order = [name for name in disk.log if name in ("write", "fsync", "replace")]
    last_write = len(order) - 1 - order[::-1].index("write")
    assert order[last_write + 1 :] == ["fsync", "replace", "fsync"]


def test_new_parent_folders_are_synced_into_their_own_parents(tmp_path: Path, disk: Disk) -> None:
    storage.write_bytes(tmp_path / "a" / "b" / "file", NEW)
    assert disk.log[:6] == ["mkdir", "open", "fsync", "mkdir", "open", "fsync"]
    assert (tmp_path / "a" / "b" / "file").read_bytes() == NEW


def test_an_error_inside_the_block_leaves_the_old_file_and_passes_through(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), storage.atomic_file(path) as file:
        file.write(NEW[: 1 // 0])
    assert path.read_bytes() == OLD
    assert files(tmp_path) == ["file"]


def test_the_file_cannot_be_seen_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with storage.atomic_file(path) as file:
        file.write(NEW)
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == NEW


@pytest.mark.usefixtures("umask")
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    with storage.atomic_folder(tmp_path / "folder") as folder:
        storage.write_text(folder / "file", "x")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_writing_over_a_link_keeps_the_link_and_changes_its_target(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "target").write_bytes(OLD)
    link = tmp_path / "link"
    link.symlink_to(elsewhere / "target")
    storage.write_bytes(link, NEW)
    assert link.is_symlink()
    assert (elsewhere / "target").read_bytes() == NEW
    assert files(tmp_path) == ["elsewhere/target", "link"]


def test_writing_over_a_dangling_link_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "target")
    storage.write_bytes(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "missing" / "target").read_bytes() == NEW


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with path.open("rb") as reader:
        storage.write_bytes(path, NEW)
        assert reader.read() == OLD


@pytest.mark.parametrize("obstacle", ["parent is a file", "path is a folder"])
def test_what_is_in_the_way_is_named_and_kept(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "thing" / "file"
    if obstacle == "parent is a file":
        (tmp_path / "thing").write_bytes(OLD)
    else:
        path.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"could not write .*thing"):
        storage.write_bytes(path, NEW)
    assert files(tmp_path) == (["thing"] if obstacle == "parent is a file" else [])


HINTS = {errno.ENOSPC: "free some space", errno.EDQUOT: "quota", errno.EACCES: "permission", errno.EROFS: "read-only", errno.EIO: "healthy"}


@pytest.mark.parametrize(("error", "hint"), HINTS.items())
def test_the_hint_fits_the_cause(error: int, hint: str) -> None:
    with pytest.raises(StorageError) as caught, storage.storage_errors("write", Path("a")):
        raise OSError(error, os.strerror(error))
    assert hint in caught.value.hint
    assert caught.value.exit_code == 5


def test_json_reads_back_and_never_holds_nan(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None, True], "name": os.fsdecode(b"not utf-8: \xff.png")}
    storage.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == value


# Appending


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_append_leaves_no_half_line(tmp_path: Path, disk: Disk, error: int) -> None:
    path = tmp_path / "new" / "log"
    line = "x" * 1000 + "\n"
    for problem in sweep(disk, lambda: storage.append_text(path, line), error):
        assert problem.message == f"could not append to {path}: {os.strerror(error)}"  # type: ignore[attr-defined]
        assert not path.exists() or path.read_text() == ""
    assert path.read_text() == line


def test_lines_are_appended_after_what_is_there(tmp_path: Path) -> None:
    storage.append_text(tmp_path / "log", "a\n")
    storage.append_text(tmp_path / "log", "b\nc\n")
    assert (tmp_path / "log").read_text() == "a\nb\nc\n"


# Folders


def fill(path: Path) -> None:
    with storage.atomic_folder(path) as folder:
        storage.write_bytes(folder / "a", NEW)
        storage.write_bytes(folder / "deep" / "b", NEW)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, Crash])
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, disk: Disk, error: int | type[Crash]) -> None:
    path = tmp_path / "folder"
    for _ in sweep(disk, lambda: fill(path), error):
        if path.exists():
            assert "rename" in disk.log
            assert files(path) == ["a", "deep/b"]
            storage.remove_folder(path)
        elif error is not Crash:
            assert files(tmp_path) == []
        storage.remove_temporaries(tmp_path)
        assert files(tmp_path) == []
    assert files(path) == ["a", "deep/b"]


def test_a_folder_is_synced_with_its_folders_before_it_gets_its_name(tmp_path: Path, disk: Disk) -> None:
    fill(tmp_path / "folder")
    order = [name for name in disk.log if name in ("write", "replace", "fsync", "rename")]
    assert order[-6:] == ["replace", "fsync", "fsync", "fsync", "rename", "fsync"]


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "folder")
    with pytest.raises(StorageError, match="exists already"):
        fill(tmp_path / "folder")
    assert files(tmp_path) == ["folder/a", "folder/deep/b"]


def test_a_crash_while_removing_leaves_the_folder_or_a_temporary(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "folder"
    fill(path)
    for at in range(1, 20):
        disk.fail(at, Crash)
        with contextlib.suppress(Crash):
            storage.remove_folder(path)
        disk.at = 0
        if not list(tmp_path.iterdir()):
            break
        assert not path.exists() or files(path) == ["a", "deep/b"]
        storage.remove_temporaries(tmp_path)
        assert files(tmp_path) in ([], ["folder/a", "folder/deep/b"])
        if not path.exists():
            fill(path)
    assert at > 3


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("a.tmp-0123abcd", "b.tmp-short", "c.tmp-0123abcd.png", "tmp-0123abcd", "d.TMP-0123ABCD"):
        (tmp_path / name).write_bytes(OLD)
    (tmp_path / "e.tmp-89abcdef" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "f.tmp-89abcdef").symlink_to(tmp_path / "outside")
    storage.remove_temporaries(tmp_path)
    kept = ["b.tmp-short", "c.tmp-0123abcd.png", "d.TMP-0123ABCD", "outside", "tmp-0123abcd"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    storage.remove_temporaries(tmp_path / "nowhere")


def test_young_leftovers_can_be_spared(tmp_path: Path) -> None:
    for name in ("old.tmp-00000000", "young.tmp-00000000"):
        (tmp_path / name).write_bytes(OLD)
    os.utime(tmp_path / "old.tmp-00000000", (0, 0))
    storage.remove_temporaries(tmp_path, older_than_seconds=3600)
    assert files(tmp_path) == ["young.tmp-00000000"]


# Looking


def test_the_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert storage.digest_file(tmp_path / "file", chunk_bytes=2) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(StorageError, match="could not read"):
        storage.digest_file(tmp_path / "missing")


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "not" / "yet") > 0


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    storage.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, disk: Disk) -> None:
    disk.fail(1, errno.EACCES)
    with pytest.raises(StorageError, match=r"could not write to .*: Permission denied"):
        storage.check_writable(tmp_path)
    (tmp_path / "file").write_bytes(OLD)
    disk.fail(0, errno.EACCES)
    with pytest.raises(StorageError, match=r"could not write to .*file"):
        storage.check_writable(tmp_path / "file")


def test_removing_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    storage.remove_file(tmp_path / "file")
    storage.remove_file(tmp_path / "file")
    assert files(tmp_path) == []


# Locks

HOLD = """
import os, pathlib, sys, time
from aquatint.storage import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    started, ready = os.pipe()
    if os.fork() == 0:  # a worker that outlives its parent for a moment
        os.write(ready, b"!")
        time.sleep(1)
        os._exit(0)
    os.read(started, 1)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=r"another process is working in .*run"), storage.folder_lock(tmp_path / "run"):
            pytest.fail("two processes hold the folder")
        holder.kill()
        holder.wait()
        with storage.folder_lock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").exists()


def test_an_error_under_the_lock_is_not_an_error_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.folder_lock(tmp_path):
        raise FileNotFoundError


HOLD_SHARED = """
import pathlib, sys
from aquatint.storage import shared_lock
with shared_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_any_number_of_processes_may_rely_on_a_folder_and_none_may_tidy_up_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with contextlib.ExitStack() as stack:
        holders = []
        for _ in range(2):
            command = [sys.executable, "-c", HOLD_SHARED, str(folder)]
            holder = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            holders.append(holder)
        with storage.shared_lock(folder), storage.shared_lock(folder):
            pass
        for holder in holders:
            with pytest.raises(LockedError, match=r"cache is in use by another process"), storage.exclusive_lock(folder):
                pytest.fail("a folder in use is held")
            holder.kill()
            holder.wait()
        with storage.exclusive_lock(folder):
            assert files(folder) == ["in-use.lock"]


def test_nobody_relies_on_a_folder_while_it_is_tidied_up(tmp_path: Path) -> None:
    with storage.exclusive_lock(tmp_path):
        with pytest.raises(LockedError, match="tidying up in"), storage.shared_lock(tmp_path):
            pytest.fail("a folder is used while it is tidied up")
        with pytest.raises(LockedError), storage.exclusive_lock(tmp_path):
            pytest.fail("two processes tidy up")
    with storage.shared_lock(tmp_path), pytest.raises(LockedError), storage.exclusive_lock(tmp_path):
        pytest.fail("a folder in use is held")


def test_a_folder_that_cannot_be_written_can_be_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, mode: str) -> Any:
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return io.FileIO(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", read_only, raising=False)
        with storage.shared_lock(tmp_path):
            assert files(tmp_path) == []
        with pytest.raises(StorageError, match=r"could not lock .*: Read-only file system"), storage.exclusive_lock(tmp_path):
            pytest.fail("the folder is held without a file")
    with storage.exclusive_lock(tmp_path):
        pass
    monkeypatch.setattr(storage, "open", read_only, raising=False)
    with storage.shared_lock(tmp_path):
        monkeypatch.undo()
        with pytest.raises(LockedError), storage.exclusive_lock(tmp_path):
            pytest.fail("a folder in use is held")


def test_a_disk_that_fails_is_not_taken_for_a_lock(tmp_path: Path, disk: Disk) -> None:
    for lock in (storage.shared_lock, storage.exclusive_lock):
        disk.fail(1, errno.EIO)
        with pytest.raises(StorageError, match="could not lock"), lock(tmp_path):
            pytest.fail("held")
