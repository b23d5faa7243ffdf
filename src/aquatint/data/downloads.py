"""Files behind URLs, read through a folder of copies: each is whole, has a digest, and is used until the original changes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aquatint import storage
from aquatint.errors import AquatintError, StorageError, UsageError

FORMAT = 1
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.5  # before the second attempt; doubled for each one after it
_CHUNK_BYTES = 4 << 20
_ABANDONED_SECONDS = 3600.0  # a temporary file in which nothing was written for so long has lost its writer
_MAX_REMEMBERED = 100_000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_VALIDATORS = (  # what servers call that which differs between versions of a file, the most telling first
    "ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "LastModified", "Last-Modified", "last_modified", "updated", "mtime",
)  # fmt: skip

Validators = tuple[int, int]  # size in bytes (-1: unknown), and 63 bits of a digest of what the server says of the version


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def public_name(path: str) -> str:
    """The path or URL as it may be shown and written: without a user, password, query or fragment, where secrets are."""
    if not is_url(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, tail = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{tail}"


class _RemoteTrouble(Exception):
    """Why a remote file cannot be had. Not an OSError, which would be taken for trouble with our own disk; `final` is one if
    there is no use in trying again."""

    def __init__(self, reason: str, final: OSError | None = None) -> None:
        super().__init__(reason)
        self.final = final


class Downloads:
    """Copies of remote files in `folder`. Picklable, and any number of threads and processes may share the folder.

    A copy is a file named by the digest of its URL, published before its record: a crash leaves nothing that is trusted.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._is_clean = False
        self._busy: dict[str, threading.Lock] = {}
        self._known: OrderedDict[str, Validators] = OrderedDict()
        self._trusted: OrderedDict[str, Path] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"folder": self.folder, "_known": self._known.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]
        self._known = state["_known"]

    def identity(self, url: str) -> Validators:
        """What the server says of the file now. Raises OSError if it is not there, StorageError if the server does not answer."""
        found = validators(_persistently(url, lambda: _info(url)))
        with self._lock:
            if self._known.get(url) != found:
                self._trusted.pop(url, None)
            _remember(self._known, url, found)
        return found

    def fetch(self, url: str) -> Path:
        """The copy, downloaded if there is none of this version. Raises OSError, StorageError, UsageError without a folder."""
        if self.folder is None:
            raise UsageError(f"{public_name(url)} must be downloaded, and there is no folder for that", hint="set cache.folder")
        with self._lock:
            busy = self._busy.setdefault(url, threading.Lock())
        with busy:
            if copy := self._trusted.get(url):
                return copy
            version = self._known.get(url) or self.identity(url)
            copy = self.folder / hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
            if not _is_good(copy, version):
                self._clean()
                _persistently(url, lambda: _download(url, version, copy))
            with self._lock:
                _remember(self._trusted, url, copy)
                self._busy.pop(url, None)
            return copy

    def _clean(self) -> None:
        """Removes, once, what downloads of killed processes left behind."""
        with self._lock:
            is_first, self._is_clean = not self._is_clean, True
        if is_first and self.folder is not None:
            storage.remove_temporaries(self.folder, older_than_seconds=_ABANDONED_SECONDS)


def _remember(memory: OrderedDict[str, Any], key: str, value: Any) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _MAX_REMEMBERED:
        memory.popitem(last=False)


# The copy


def _record_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.json")


def _is_good(copy: Path, version: Validators) -> bool:
    """Whether the copy is of that version and has the bytes that were downloaded; they are read again if the file was touched."""
    try:
        record = json.loads(_record_of(copy).read_bytes())
        status = copy.stat()
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != list(version):
        return False
    if record.get("file") == _stamp(status):
        return True
    return status.st_size == record.get("size") and _digest(copy) == record.get("blake2b")


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(path: Path) -> str:
    with storage.storage_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _download(url: str, version: Validators, copy: Path) -> None:
    """Publishes a copy and then its record. Raises _RemoteTrouble if what comes is not all of that version."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    with storage.atomic_file(copy) as file:
        for chunk in _chunks(url):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        if version[0] not in (-1, size):
            raise _RemoteTrouble(f"{size:,} of {version[0]:,} bytes came")
        if validators(_info(url)) != version:
            raise StorageError(
                f"{public_name(url)} was changed since it was listed", hint="run the same command again when nothing writes there"
            )
    record = {
        "format": FORMAT, "url": public_name(url), "version": list(version), "size": size, "blake2b": digest.hexdigest(),
        "file": _stamp(copy.stat()),
    }  # fmt: skip
    storage.write_json(_record_of(copy), record)


# The server


def validators(info: dict[str, Any]) -> Validators:
    """The size and version that a listing or a question to the server gave."""
    known = next((f"{name.lower()}={info[name]}" for name in _VALIDATORS if info.get(name)), "")
    number = int.from_bytes(hashlib.blake2b(known.encode(), digest_size=8).digest(), "big") >> 1
    size = info.get("size")
    return (size if isinstance(size, int) else -1), number if known else 0


def list_remote(url: str) -> list[dict[str, Any]]:
    """What lies directly in a remote folder: `name` (a URL), `type`, and what `validators` needs. Raises OSError, StorageError."""
    listed: list[dict[str, Any]] = _persistently(url, lambda: _list(url))
    return listed


def glob_remote(pattern: str) -> list[str]:
    """The URLs that match a pattern, sorted. Raises OSError, StorageError."""
    found: list[str] = _persistently(pattern, lambda: _glob(pattern))
    return found


def _persistently(url: str, action: Any) -> Any:
    """Tries again, a little later each time, when a server or the way to it is in trouble. Raises StorageError in the end."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        try:
            return action()
        except _RemoteTrouble as error:
            if error.final is not None:
                raise error.final from error
            trouble = error
    raise StorageError(
        f"could not read {public_name(url)}: {trouble}", hint="check the connection and the credentials, then run the same command again"
    ) from trouble


def _info(url: str) -> dict[str, Any]:
    with _remote_errors(url):
        system, path = _filesystem(url)
        system.invalidate_cache()  # or an old listing would answer
        info: dict[str, Any] = system.info(path)
    if info.get("type") == "directory":
        raise _RemoteTrouble("", IsADirectoryError(errno.EISDIR, "it is a folder", public_name(url)))
    return info


def _list(url: str) -> list[dict[str, Any]]:
    with _remote_errors(url):
        system, path = _filesystem(url)
        system.invalidate_cache()
        return [{**info, "name": system.unstrip_protocol(info["name"])} for info in system.ls(path, detail=True)]


def _glob(pattern: str) -> list[str]:
    with _remote_errors(pattern):
        system, path = _filesystem(pattern)
        system.invalidate_cache()
        return sorted(system.unstrip_protocol(name) for name in system.glob(path))


def _chunks(url: str) -> Iterator[bytes]:
    with _remote_errors(url):
        system, path = _filesystem(url)
        file: BinaryIO = system.open(path, "rb", **({"block_size": 0} if _is_http(url) else {}))  # 0: one request, not one per block
    with contextlib.closing(file):
        while True:
            with _remote_errors(url):
                chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path on it. Asked for each time: its instances must not cross a fork."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url, **(_http_options() if _is_http(url) else {}))
    except ImportError as error:
        raise AquatintError(f"{public_name(url)} needs a package that is missing: {error}", hint="pip install aquatint[remote]") from error
    except ValueError as error:
        raise UsageError(f"{public_name(url)} is no address that can be read: {error}", hint="correct the path in data.sources") from error
    return system, path


def _http_options() -> dict[str, Any]:
    """No limit for the whole of a long download, as there is by default, but one for silence."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Whatever a file system's package raises becomes _RemoteTrouble, which is tried again, or an OSError, which is not."""
    try:
        yield
    except (AquatintError, _RemoteTrouble, MemoryError):
        raise
    except Exception as error:
        raise _trouble(url, error) from error


def _trouble(url: str, error: Exception) -> _RemoteTrouble:
    if _is_http(url) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec calls every failure to ask a web server so
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return _RemoteTrouble("", FileNotFoundError(errno.ENOENT, "it does not exist", public_name(url)))
    if isinstance(error, PermissionError) or status in (401, 403):
        return _RemoteTrouble("", PermissionError(errno.EACCES, "the server does not allow it", public_name(url)))
    reason = (str(error) or type(error).__name__).partition("\n")[0]
    return _RemoteTrouble(re.sub(r"\?[^\s'\"]*", "?…", reason.replace(url, public_name(url))))
