"""Folders of an object store, as if they were folders of a disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from posixpath import basename

from aquatint.data.downloads import list_remote, public_name, validators
from aquatint.data.places import Identity
from aquatint.data.sources.listing import Contents
from aquatint.errors import DataError, UsageError


def scan_bucket(url: str) -> Callable[[str], Contents]:
    """Lists folders by their path in the one at `url`. A listing tells sizes and versions too, so no file is asked for them.

    Raises UsageError for a web server, which has no listing, and DataError if there is nothing at `url`.
    """
    if url.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"a web server cannot be asked for the pictures in {public_name(url)}",
            hint="list them in a table, or pack them into tar files and name these: a folder can be on a disk or in an object store",
        )
    root = url.rstrip("/")

    def scan(path: str) -> Contents:
        folders, identities = [], {}
        try:
            listed = list_remote(f"{root}/{path}".rstrip("/"))
        except FileNotFoundError as error:
            if path:
                raise
            raise DataError(f"the picture folder {public_name(url)} does not exist", hint="correct the path in data.sources") from error
        for info in listed:
            name = basename(info["name"].rstrip("/"))
            if info["type"] == "directory":
                folders.append(name)
            elif not info["name"].endswith("/"):  # which is how stores mark a folder
                size, version = validators(info)
                identities[name] = Identity(size, 0, 0, version)
        return Contents(folders, list(identities), lambda name: _known(identities, name))

    return scan


def _known(identities: dict[str, Identity], name: str) -> Identity:
    if name not in identities:
        raise FileNotFoundError(errno.ENOENT, "it does not exist", name)
    return identities[name]
